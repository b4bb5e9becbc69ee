//! What one host shows and trusts, and its handshakes.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};
use webpki::EndEntityCert;

use super::{file, private, stream};
use crate::error::{Error, ErrorKind, Result};
use crate::link::Link;

/// What is spoken inside, so that nothing else is taken for it.
const PROTOCOL: &[u8] = b"blockferry";

/// A certificate with its key, and the authority whose certificates are trusted.
#[derive(Clone)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Identity {
    /// Nothing: there is a key in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// Who is at the other end of a link, as its certificate says.
#[derive(Clone, Debug)]
pub struct Peer {
    certificate: CertificateDer<'static>,
}

impl Peer {
    /// Whether its certificate is valid for this name or IP address.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        let (Ok(certificate), Ok(name)) = (
            EndEntityCert::try_from(&self.certificate),
            ServerName::try_from(name),
        ) else {
            return false;
        };
        certificate.verify_is_valid_for_subject_name(&name).is_ok()
    }

    /// For messages: the first name of its certificate, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        let certificate = EndEntityCert::try_from(&self.certificate).ok()?;
        certificate.valid_dns_names().next().map(str::to_owned)
    }
}

impl Identity {
    /// Of certificates and a key in PEM: the authority's, the host's own (with those between it and the authority
    /// behind it, if there are any), and the key of the latter.
    ///
    /// # Errors
    /// One of them is none, or they do not belong together.
    pub fn new(authority: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self> {
        let mut trusted = RootCertStore::empty();
        for root in certificates(authority, "the authority")? {
            trusted.add(root).map_err(|error| {
                private::refused("use the certificate of the authority".to_owned(), error)
            })?;
        }
        let trusted = Arc::new(trusted);
        let chain = certificates(certificate, "this host")?;
        // The cause of a key that cannot be read could tell something about it.
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_secret| {
            unusable("the key of this host: expected a private key in PEM, found something else")
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = client(
            &provider,
            Arc::clone(&trusted),
            chain.clone(),
            key.clone_key(),
        )?;
        let server = server(&provider, trusted, chain, key)?;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// From the three files in `dir` that [`mod@file`] names.
    ///
    /// # Errors
    /// One of them cannot be read, others than its owner may read the key, and as [`Self::new`].
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let authority = private::read(&dir.join(file::AUTHORITY))?;
        let certificate = private::read(&dir.join(file::CERTIFICATE))?;
        let key = private::read_secret(&dir.join(file::KEY))?;
        Self::new(&authority, &certificate, &key)
            .map_err(|error| private::refused(format!("certificates in {}", dir.display()), error))
    }

    /// Shakes hands with the server at the other end of `socket`, which must show a certificate for `name` (a host or
    /// an IP address), within `time`.
    ///
    /// # Errors
    /// One side does not trust the other, or the peer does not answer in time, or is no TLS server.
    pub fn connect(&self, mut socket: TcpStream, name: &str, time: Duration) -> Result<Link> {
        let server = ServerName::try_from(name.to_owned())
            .map_err(|error| private::refused(format!("connect to {name}"), error))?;
        let session = ClientConnection::new(Arc::clone(&self.client), server)
            .map_err(|error| private::refused(format!("connect to {name}"), error))?;
        let mut session = Connection::from(session);
        shake_hands(&mut session, &mut socket, name, time)?;
        stream::link(session, socket, name.to_owned())
            .map_err(|error| Error::lost(format!("use the connection to {name}"), error))
    }

    /// Shakes hands with the client at the other end of `socket`, within `time`. `label` names it in messages.
    ///
    /// # Errors
    /// It shows no certificate of our authority, does not ask in time, or speaks no TLS 1.3.
    pub fn accept(
        &self,
        mut socket: TcpStream,
        label: &str,
        time: Duration,
    ) -> Result<(Link, Peer)> {
        let session = ServerConnection::new(Arc::clone(&self.server))
            .map_err(|error| private::refused(format!("answer {label}"), error))?;
        let mut session = Connection::from(session);
        shake_hands(&mut session, &mut socket, label, time)?;
        let certificate = session
            .peer_certificates()
            .and_then(<[_]>::first)
            .ok_or_else(|| unusable(&format!("{label} showed no certificate")))?;
        let peer = Peer {
            certificate: certificate.clone().into_owned(),
        };
        let link = stream::link(session, socket, label.to_owned())
            .map_err(|error| Error::lost(format!("use the connection of {label}"), error))?;
        Ok((link, peer))
    }
}

fn unusable(message: &str) -> Error {
    Error::new(ErrorKind::Credentials, message)
}

fn not_ours(error: rustls::Error) -> Error {
    private::refused("use the certificate of this host".to_owned(), error)
}

fn certificates(pem: &[u8], whose: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<std::result::Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_none) => Err(unusable(&format!(
            "the certificate of {whose}: expected one in PEM, found none"
        ))),
        Err(error) => Err(private::refused(
            format!("the certificate of {whose}: expected one in PEM"),
            error,
        )),
    }
}

fn client(
    provider: &Arc<CryptoProvider>,
    trusted: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(not_ours)?
        .with_root_certificates(trusted)
        .with_client_auth_cert(chain, key)
        .map_err(not_ours)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // Each connection proves who it is.
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server(
    provider: &Arc<CryptoProvider>,
    trusted: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig> {
    let verifier = WebPkiClientVerifier::builder_with_provider(trusted, Arc::clone(provider))
        .build()
        .map_err(|error| {
            private::refused("use the certificate of the authority".to_owned(), error)
        })?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(not_ours)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(not_ours)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// As far as this side can: a client learns only when it reads that it is not trusted.
fn shake_hands(
    session: &mut Connection,
    socket: &mut TcpStream,
    peer: &str,
    time: Duration,
) -> Result<()> {
    // What is sent last would else wait for more.
    socket.set_nodelay(true).ok();
    let mut timed = Timed {
        socket,
        end: Instant::now() + time,
    };
    while session.is_handshaking() {
        match session.complete_io(&mut timed) {
            Ok(_) => {}
            Err(error) if is_timeout(&error) => {
                return Err(Error::new(
                    ErrorKind::TimedOut,
                    format!(
                        "{peer}: expected a TLS handshake within {} s",
                        time.as_secs_f64()
                    ),
                ));
            }
            Err(error) => {
                return Err(stream::explained(
                    &format!("TLS handshake with {peer}"),
                    error,
                ));
            }
        }
    }
    if session.alpn_protocol() == Some(PROTOCOL) {
        return Ok(());
    }
    Err(Error::protocol(format!(
        "TLS handshake with {peer}: expected a blockferry, found something else"
    )))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// A socket whose reads and writes end in time, however slowly the peer trickles.
struct Timed<'s> {
    socket: &'s mut TcpStream,
    end: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.end.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}
