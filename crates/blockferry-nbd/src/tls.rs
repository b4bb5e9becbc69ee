//! TLS to a server, with certificates named as libnbd and QEMU name them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use blockferry_device::{Error, ErrorKind, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::stream::Stream;

/// Longest file of certificates that is taken in.
const MAX_PEM_BYTES: u64 = 1 << 20;
/// The authority, the certificate of this client and its key: as libnbd and QEMU name them, and as blockferry does.
const NAMES: [[&str; 3]; 2] = [
    ["ca-cert.pem", "client-cert.pem", "client-key.pem"],
    ["ca.pem", "host.pem", "host.key"],
];

/// A stream to a server that spoke for `host`, whose certificate an authority in `directory` has signed.
///
/// # Errors
/// There are no such certificates, the server's is not one of them, or the connection failed.
pub(crate) fn secure(
    stream: Stream,
    directory: &Path,
    host: &str,
    label: &str,
) -> Result<StreamOwned<ClientConnection, Stream>> {
    let failed = |why: String| Error::new(ErrorKind::Denied, format!("TLS with {label}: {why}"));
    let name = ServerName::try_from(host.to_owned())
        .map_err(|cause| failed(format!("host {host:?}: {cause}")))?;
    let connection = ClientConnection::new(Arc::new(config(directory)?), name)
        .map_err(|cause| failed(cause.to_string()))?;
    let mut secured = StreamOwned::new(connection, stream);
    while secured.conn.is_handshaking() {
        secured
            .conn
            .complete_io(&mut secured.sock)
            .map_err(|cause| failed(cause.to_string()))?;
    }
    Ok(secured)
}

fn config(directory: &Path) -> Result<ClientConfig> {
    let names = NAMES
        .into_iter()
        .find(|[authority, ..]| directory.join(authority).exists())
        .ok_or_else(|| {
            let text = format!(
                "certificates in {}: expected ca-cert.pem there, with client-cert.pem and client-key.pem if the server \
                 wants to know its clients; or ca.pem, host.pem and host.key",
                directory.display()
            );
            Error::new(ErrorKind::NotFound, text)
        })?;
    let [authority, certificate, key] = names.map(|name| directory.join(name));
    let mut trusted = RootCertStore::empty();
    for root in certificates(&authority)? {
        trusted
            .add(root)
            .map_err(|cause| unusable(&authority, &cause.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|cause| unusable(&authority, &cause.to_string()))?
        .with_root_certificates(trusted);
    if !certificate.exists() {
        return Ok(builder.with_no_client_auth());
    }
    let chain = certificates(&certificate)?;
    // The cause could tell something about it.
    let secret = PrivateKeyDer::from_pem_slice(&read_secret(&key)?)
        .map_err(|_secret| unusable(&key, "expected a private key in PEM, found something else"))?;
    builder
        .with_client_auth_cert(chain, secret)
        .map_err(|cause| unusable(&certificate, &cause.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(path, |_| Ok(()))?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(unusable(path, "expected certificates in PEM, found none")),
        Err(cause) => Err(unusable(path, &cause.to_string())),
    }
}

fn read_secret(path: &Path) -> Result<Vec<u8>> {
    read(path, |file| {
        let mode = file.metadata()?.permissions().mode() & 0o777;
        if mode & 0o077 == 0 {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "expected a key that only its owner may read, found mode {mode:03o}"
        )))
    })
}

fn read(path: &Path, check: impl FnOnce(&File) -> io::Result<()>) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = File::open(path).and_then(|file| check(&file).map(|()| file));
    let read = file.and_then(|file| file.take(MAX_PEM_BYTES + 1).read_to_end(&mut text));
    let bytes = read.map_err(|cause| Error::from_io(format!("read {}", path.display()), cause))?;
    if bytes as u64 > MAX_PEM_BYTES {
        return Err(unusable(path, "expected at most 1 MiB, found more"));
    }
    Ok(text)
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::new(
        ErrorKind::Unsuitable,
        format!("use {}: {why}", path.display()),
    )
}
