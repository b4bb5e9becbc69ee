//! A small private authority, for those who have none: it makes the certificates of hosts that trust each other.

use std::fmt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use time::{Duration, OffsetDateTime};

use super::private;
use crate::error::{Error, ErrorKind, Result};

/// The key of the authority, in its directory: whoever has it can be any host.
const KEY: &str = "ca.key";
/// How long the authority is to be trusted.
const DAYS: u32 = 3650;
/// Clocks differ.
const EARLIER: Duration = Duration::days(1);

/// Makes certificates. Its own is self-signed.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl fmt::Debug for Authority {
    /// Nothing: there is a key in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate of one host, and its key, both in PEM.
#[expect(clippy::exhaustive_structs, reason = "plain texts")]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl fmt::Debug for Issued {
    /// Nothing of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

impl Authority {
    /// The one whose files are in `dir`; made now, trusted for ten years, where there is none.
    ///
    /// # Errors
    /// Its files cannot be read or made, or others than their owner may read its key.
    pub fn open(dir: &Path) -> Result<Self> {
        let (certificate, key) = (dir.join(super::file::AUTHORITY), dir.join(KEY));
        let (there, missing) = match (certificate.exists(), key.exists()) {
            (true, true) => return Self::read(&certificate, &key),
            (false, false) => return Self::make(&certificate, &key),
            (true, false) => (certificate, key),
            (false, true) => (key, certificate),
        };
        Err(Error::new(
            ErrorKind::Credentials,
            format!(
                "expected an authority in {}, found {} without {}",
                dir.display(),
                there.display(),
                missing.display()
            ),
        ))
    }

    fn read(certificate_file: &Path, key_file: &Path) -> Result<Self> {
        let certificate = text(private::read(certificate_file)?, certificate_file)?;
        let key = text(private::read_secret(key_file)?, key_file)?;
        // The cause could tell something about the key.
        let key = KeyPair::from_pem(&key).map_err(|_secret| {
            let found = format!(
                "{}: expected a private key in PEM, found something else",
                key_file.display()
            );
            Error::new(ErrorKind::Credentials, found)
        })?;
        if !is_of(&certificate, &key) {
            let found = format!(
                "{} and {}: expected a certificate and its key, found two that do not belong together",
                certificate_file.display(),
                key_file.display()
            );
            return Err(Error::new(ErrorKind::Credentials, found));
        }
        Ok(Self {
            issuer: Issuer::new(params()?, key),
            certificate,
        })
    }

    fn make(certificate_file: &Path, key_file: &Path) -> Result<Self> {
        let key = KeyPair::generate().map_err(failed("make a key"))?;
        let params = params()?;
        let certificate = params
            .self_signed(&key)
            .map_err(failed("sign a certificate"))?
            .pem();
        private::create(key_file, &key.serialize_pem(), true)?;
        private::create(certificate_file, &certificate, false)?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// A certificate, valid for `days`, of a host that has all these names: host names and IP addresses. It serves and
    /// connects.
    ///
    /// # Errors
    /// A name is none, or there are none.
    pub fn issue(&self, names: &[String], days: u32) -> Result<Issued> {
        let attempt = format!("make a certificate for {}", names.join(","));
        let Some(first) = names.first() else {
            return Err(Error::new(
                ErrorKind::Credentials,
                "a certificate needs a name",
            ));
        };
        let mut params = CertificateParams::new(names.to_vec()).map_err(failed(&attempt))?;
        params
            .distinguished_name
            .push(DnType::CommonName, first.as_str());
        (params.not_before, params.not_after) = validity(days);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed("make a key"))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(failed(&attempt))?;
        Ok(Issued {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Its certificate, in PEM: what the hosts trust.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }
}

impl Issued {
    /// Writes the three files of a host into `dir`, which is made and must not have been there.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn write(&self, dir: &Path, authority: &Authority) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
        made.map_err(|error| private::refused(format!("create {}", dir.display()), error))?;
        private::create(
            &dir.join(super::file::AUTHORITY),
            authority.certificate(),
            false,
        )?;
        private::create(
            &dir.join(super::file::CERTIFICATE),
            &self.certificate,
            false,
        )?;
        private::create(&dir.join(super::file::KEY), &self.key, true)
    }
}

/// What the authority calls itself; its key tells it from others. The same each time: hosts look for this name.
fn params() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new()).map_err(failed("describe an authority"))?;
    params
        .distinguished_name
        .push(DnType::CommonName, "blockferry private authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(DAYS);
    Ok(params)
}

fn is_of(certificate: &str, key: &KeyPair) -> bool {
    let Ok(certificate) = CertificateDer::from_pem_slice(certificate.as_bytes()) else {
        return false;
    };
    // What the certificate has of it is without the outermost header.
    webpki::anchor_from_trusted_cert(&certificate).is_ok_and(|anchor| {
        key.subject_public_key_info()
            .ends_with(&anchor.subject_public_key_info)
    })
}

fn validity(days: u32) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - EARLIER, now + Duration::days(days.into()))
}

fn failed(attempt: &str) -> impl FnOnce(rcgen::Error) -> Error {
    let attempt = attempt.to_owned();
    move |error| private::refused(attempt, error)
}

fn text(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|_binary| {
        let found = format!("{}: expected PEM, found no text", path.display());
        Error::new(ErrorKind::Credentials, found)
    })
}
