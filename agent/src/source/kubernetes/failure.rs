//! Why the API does not answer as it should, in words with a remedy.
//!
//! What a failure means for the way on (wait, list anew, read the credentials
//! anew) is decided by its [`Cause`], never by its words.

use std::error::Error;
use std::time::Duration;

use hyper::StatusCode;
use rustls::CertificateError;
use rustls::pki_types::UnixTime;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What happened, for people.
    pub(crate) words: String,
    /// What to do about it, for people.
    pub(crate) remedy: String,
    pub(crate) cause: Cause,
    /// How long the server asks to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// No connection stands, or it broke off, or it went silent.
    Unreachable,
    /// TLS does not come about: one side does not believe the other's certificate.
    Untrusted,
    /// The server answers with a code that is no success.
    Refused(StatusCode),
    /// The server does not know yet of a state that another has told us of.
    TooNew,
    /// What came is nothing that the API says.
    Nonsense,
}

impl Failure {
    pub(crate) fn new(cause: Cause, words: String) -> Self {
        Self {
            words,
            remedy: remedy(cause).to_owned(),
            cause,
            retry_after: None,
        }
    }

    /// One of what is nothing that the API says.
    pub(crate) fn nonsense(words: String) -> Self {
        Self::new(Cause::Nonsense, words)
    }

    /// One of a request that got no answer from the server at `address`.
    pub(crate) fn of_request(address: &str, error: &kube_client::Error) -> Self {
        // That it comes from a layer below is no news for anybody.
        let error: &(dyn Error + 'static) = match error {
            kube_client::Error::Service(inner) => inner.as_ref(),
            other => other,
        };
        let Some(error) = tls_error(error) else {
            let words = format!("{address}: {}", chain(error));
            return Self::new(Cause::Unreachable, words);
        };
        let (words, remedy) = tls_words(error);
        Self {
            words: format!("{address}: {words}"),
            remedy,
            cause: Cause::Untrusted,
            retry_after: None,
        }
    }

    /// Whether other credentials may help.
    pub(crate) fn asks_for_credentials(&self) -> bool {
        matches!(
            self.cause,
            Cause::Untrusted | Cause::Refused(StatusCode::UNAUTHORIZED)
        )
    }

    /// Whether another server may do better.
    pub(crate) fn is_of_server(&self) -> bool {
        match self.cause {
            Cause::Unreachable | Cause::Untrusted | Cause::TooNew | Cause::Nonsense => true,
            Cause::Refused(code) => !code.is_client_error() || self.asks_for_credentials(),
        }
    }

    /// Whether it may be the fault of the version from which a watch was asked
    /// for. A server that is away, or busy, or does not know us says nothing about
    /// versions; were everything listed anew after each outage, every node would
    /// do so at the same moment.
    pub(crate) fn is_of_version(&self) -> bool {
        match self.cause {
            Cause::Unreachable | Cause::Untrusted => false,
            Cause::TooNew | Cause::Nonsense => true,
            Cause::Refused(code) => {
                code.is_client_error()
                    && !matches!(
                        code,
                        StatusCode::UNAUTHORIZED
                            | StatusCode::FORBIDDEN
                            | StatusCode::TOO_MANY_REQUESTS
                    )
            }
        }
    }
}

fn remedy(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused(StatusCode::UNAUTHORIZED) => {
            "renew the token or certificate; files of credentials are read anew by themselves"
        }
        Cause::Refused(StatusCode::FORBIDDEN) => {
            "give the agent's account the verbs list and watch on nodes, services, endpointslices \
             and servicecidrs"
        }
        Cause::Unreachable
        | Cause::Untrusted
        | Cause::Refused(_)
        | Cause::TooNew
        | Cause::Nonsense => "what is programmed stays as it is; it is tried again by itself",
    }
}

/// The error of TLS that is at the bottom of another.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next: Option<&'a (dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An I/O error that wraps another names that one's cause as its own.
        let within = error.downcast_ref::<std::io::Error>();
        next = match within.and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// What is wrong with TLS, and what to do.
fn tls_words(error: &rustls::Error) -> (String, String) {
    use rustls::AlertDescription as Alert;
    const CLOCK: &str = "set this node's clock, if that is what is wrong";
    let (words, remedy) = match error {
        rustls::Error::InvalidCertificate(error) => return certificate_words(error, CLOCK),
        rustls::Error::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::CertificateRequired
            | Alert::DecryptError),
        ) => (
            format!("it does not accept our certificate ({alert:?})"),
            "renew client-certificate and client-key in the kubeconfig; it is read anew by itself",
        ),
        rustls::Error::InvalidMessage(_) => (
            "what listens there does not speak TLS".to_owned(),
            "correct address and port in apiServer, or in the kubeconfig",
        ),
        other => (
            format!("TLS does not come about: {other}"),
            "correct what it says; it is tried again by itself",
        ),
    };
    (words, remedy.to_owned())
}

fn certificate_words(error: &CertificateError, clock: &str) -> (String, String) {
    let expired = |at: Option<UnixTime>| {
        let at = at.map_or_else(String::new, |at| format!(" {} s ago", ago(at)));
        let words = format!("its certificate expired{at}");
        (words, format!("renew the server's certificate; {clock}"))
    };
    let early = || {
        let words = "its certificate is not valid yet".to_owned();
        (words, format!("wait until it is; {clock}"))
    };
    let other_name = |names: String| {
        (
            format!("its certificate is not for {names}"),
            "give the server a certificate with this name, or the kubeconfig a tls-server-name \
             that it has"
                .to_owned(),
        )
    };
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "its certificate is not signed by the certificate authority of the credentials"
                .to_owned(),
            "give the authority that signed it: certificate-authority in the kubeconfig, ca.crt \
             of the service account; it is read anew by itself"
                .to_owned(),
        ),
        CertificateError::Expired => expired(None),
        CertificateError::ExpiredContext { not_after, .. } => expired(Some(*not_after)),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => early(),
        CertificateError::NotValidForName => other_name("the name that is asked for".to_owned()),
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => {
            let presented: Vec<&str> = presented.iter().map(|name| plain(name)).collect();
            let expected = expected.to_str();
            other_name(match presented.as_slice() {
                [] => format!("{expected}, nor for any name"),
                names => format!("{expected} but for {}", names.join(", ")),
            })
        }
        other => (
            format!("its certificate is not accepted: {other}"),
            "give the server a certificate of the usual kind".to_owned(),
        ),
    }
}

fn ago(at: UnixTime) -> u64 {
    UnixTime::now().as_secs().saturating_sub(at.as_secs())
}

/// A name out of `DnsName("example.com")` or `IpAddress(192.0.2.1)`.
fn plain(name: &str) -> &str {
    let inner = name.split_once('(').map_or(name, |(_, inner)| inner);
    inner.trim_end_matches(')').trim_matches('"')
}

/// An error with what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many errors say what their cause says.
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = error.source();
    }
    words
}
