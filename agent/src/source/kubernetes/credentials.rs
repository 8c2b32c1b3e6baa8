//! Credentials, read from files into what a client is made of.
//!
//! Files are read each time they are asked for, so that what was rotated is
//! found. Nothing is run: a program for credentials, as a kubeconfig can name
//! one, might never end.

use std::path::{Path, PathBuf};

use hyper::Uri;
use kube_client::Config;
use kube_client::config::{Cluster, Context, KubeConfigOptions, Kubeconfig};
use rustls::RootCertStore;
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret as _, SecretString};

use super::failure::chain;
use crate::plain_file;

/// The name in the certificate of every API server.
const SERVICE_NAME: &str = "https://kubernetes.default.svc";

/// Stands where a proxy could be named, and is never asked.
const NO_PROXY: &str = "http://proxy.invalid";

/// Where credentials come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// A kubeconfig file.
    Kubeconfig(PathBuf),
    /// The service account of the pod that we run in.
    ServiceAccount(ServiceAccount),
}

/// What a pod has of its service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceAccount {
    /// Where `token` and `ca.crt` are.
    pub(crate) folder: PathBuf,
    /// The address that the pod's environment has, as a URL: a cluster address.
    pub(crate) address: Option<String>,
}

impl ServiceAccount {
    /// The one of the pod that this process runs in.
    pub(crate) fn of_pod(folder: PathBuf) -> Self {
        let word = |name| std::env::var(name).ok().filter(|word| !word.is_empty());
        let host = word("KUBERNETES_SERVICE_HOST");
        let port = word("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
        let address = host.map(|host| match host.parse() {
            Ok(std::net::IpAddr::V6(ip)) => format!("https://[{ip}]:{port}"),
            Ok(std::net::IpAddr::V4(_)) | Err(_) => format!("https://{host}:{port}"),
        });
        Self { folder, address }
    }

    fn read(&self, has_addresses: bool) -> Result<Config, String> {
        let words = |problem: String| {
            format!(
                "no credentials of a service account: {problem}; run the agent in a pod that has \
                 one, or give --kubeconfig or --manifests"
            )
        };
        let address = match &self.address {
            // Where servers are named, certificates are for the name that all have.
            _ if has_addresses => SERVICE_NAME,
            Some(address) => address,
            None => {
                return Err(words(
                    "the environment has no KUBERNETES_SERVICE_HOST, and the configuration no \
                     apiServer"
                        .to_owned(),
                ));
            }
        };
        let file = |name: &str| {
            let path = self.folder.join(name);
            match plain_file::check(&path).and_then(|()| std::fs::read(&path)) {
                Ok(bytes) if !bytes.is_empty() => Ok((path, bytes)),
                Ok(_) => Err(words(format!("{} is empty", path.display()))),
                Err(error) => Err(words(format!("{}: {error}", path.display()))),
            }
        };
        let url = address.parse().map_err(|_| {
            words(format!(
                "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT make no URL: {address:?}"
            ))
        })?;
        let mut config = Config::new(url);
        config.auth_info.token = Some(token(file("token")?.1).map_err(words)?);
        config.root_cert_file = Some(file("ca.crt")?.0);
        // Whom to trust is what the file says, and nobody else.
        config.root_cert = Some(Vec::new());
        Ok(config)
    }
}

impl Credentials {
    /// Reads them. `has_addresses`: servers are named elsewhere.
    ///
    /// # Errors
    /// In words with a remedy.
    pub(crate) async fn read(&self, has_addresses: bool) -> Result<Config, String> {
        match self {
            Self::Kubeconfig(path) => of_kubeconfig(path).await,
            Self::ServiceAccount(account) => account.read(has_addresses),
        }
    }

    /// Whether the address that comes with them works only when an agent has
    /// programmed it.
    pub(crate) fn leads_through_a_service(&self) -> bool {
        match self {
            Self::Kubeconfig(_) => false,
            Self::ServiceAccount(_) => true,
        }
    }
}

async fn of_kubeconfig(path: &Path) -> Result<Config, String> {
    let wrong = |problem: String| format!("kubeconfig {}: {problem}", path.display());
    let words = |error: &dyn std::error::Error| {
        let words = chain(error);
        // Behind the first line stands a part of the file.
        let words = words.lines().next().unwrap_or_default();
        wrong(format!("{words}; give a file that kubectl can work with"))
    };
    plain_file::check(path).map_err(|error| wrong(error.to_string()))?;
    let mut kubeconfig = Kubeconfig::read_from(path).map_err(|error| words(&error))?;
    for (field, path) in files(&kubeconfig) {
        plain_file::check(Path::new(path))
            .map_err(|error| wrong(format!("{field} {path}: {error}")))?;
    }
    if let Some(user) = missing_user(&kubeconfig) {
        return Err(wrong(format!(
            "contexts: the current one names the user {user:?}, who is not among users; add the \
             user, or correct the name"
        )));
    }
    let mut proxied = false;
    if let Some(cluster) = current_cluster(&mut kubeconfig) {
        // Any proxy that is named here keeps the client from reading HTTPS_PROXY, which is
        // meant for others and may be nonsense.
        let proxy = cluster.proxy_url.replace(NO_PROXY.to_owned());
        proxied = proxy.is_some_and(|url| !url.is_empty());
        // As kubectl does it: what is empty was not given.
        cluster.tls_server_name.take_if(|name| name.is_empty());
        // A password is not sent, and has no place in logs.
        cluster.server = cluster.server.as_deref().map(without_user);
    }
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .map_err(|error| words(&error))?;
    config.proxy_url = None;
    let user = &config.auth_info;
    if user.exec.is_some() || user.auth_provider.is_some() {
        return Err(wrong(
            "its user has exec or auth-provider, and the agent runs no program for credentials; \
             give tokenFile, token, or client-certificate and client-key"
                .to_owned(),
        ));
    }
    if proxied {
        return Err(wrong(
            "it has a proxy-url, and the agent asks API servers directly; remove it".to_owned(),
        ));
    }
    // As kubectl does it: a file that can be read counts, and the token beside it if not.
    if let Some(path) = config.auth_info.token_file.take() {
        let read = plain_file::check(Path::new(&path)).and_then(|()| std::fs::read(&path));
        match (read, &config.auth_info.token) {
            (Ok(bytes), _) => {
                let token = token(bytes).map_err(|problem| wrong(format!("{path}: {problem}")))?;
                config.auth_info.token = Some(token);
            }
            (Err(_), Some(_)) => {}
            (Err(error), None) => return Err(wrong(format!("tokenFile {path}: {error}"))),
        }
    }
    // What is no header's value would end the program where the client is made.
    if let Some(written) = config.auth_info.token.take() {
        let bytes = written.expose_secret().as_bytes().to_vec();
        let token = token(bytes).map_err(|problem| wrong(format!("token: {problem}")))?;
        config.auth_info.token = Some(token);
    }
    let server = &config.cluster_url;
    if server.host().is_none() || !matches!(server.scheme_str(), Some("http" | "https")) {
        return Err(wrong(format!(
            "server: {server} is no URL with https; write it like https://192.0.2.1:6443"
        )));
    }
    check_tls(&config).map_err(wrong)?;
    Ok(config)
}

/// What would otherwise be found by the client, which knows neither file nor field.
fn check_tls(config: &Config) -> Result<(), String> {
    let user = &config.auth_info;
    let certificate = user.client_certificate.is_some() || user.client_certificate_data.is_some();
    let key = user.client_key.is_some() || user.client_key_data.is_some();
    if certificate != key {
        let (there, missing) = if certificate {
            ("client-certificate", "client-key")
        } else {
            ("client-key", "client-certificate")
        };
        return Err(format!(
            "its user has {there} and no {missing}; give both or none"
        ));
    }
    if let Some(certificates) = &config.root_cert {
        let mut store = RootCertStore::empty();
        let sound = certificates
            .iter()
            .all(|certificate| store.add(certificate.as_slice().into()).is_ok());
        if store.is_empty() || !sound {
            return Err(
                "certificate-authority, or certificate-authority-data, holds no certificate, or \
                 one that cannot be read; give the authority's certificate as PEM"
                    .to_owned(),
            );
        }
    }
    if let Some(name) = &config.tls_server_name
        && ServerName::try_from(name.as_str()).is_err()
    {
        return Err(format!(
            "tls-server-name: {name:?} is no name that a certificate can have; correct or remove it"
        ));
    }
    Ok(())
}

/// The current context.
fn current_context(kubeconfig: &Kubeconfig) -> Option<&Context> {
    let mut contexts = kubeconfig.contexts.iter();
    let context = contexts.find(|named| Some(&named.name) == kubeconfig.current_context.as_ref());
    context?.context.as_ref()
}

/// The user of the current context, if there is none of this name.
fn missing_user(kubeconfig: &Kubeconfig) -> Option<&str> {
    let user = current_context(kubeconfig)?.user.as_deref()?;
    let known = kubeconfig.auth_infos.iter().any(|named| named.name == user);
    (!known && !user.is_empty()).then_some(user)
}

/// The cluster of the current context.
fn current_cluster(kubeconfig: &mut Kubeconfig) -> Option<&mut Cluster> {
    let name = current_context(kubeconfig)?.cluster.clone();
    let mut clusters = kubeconfig.clusters.iter_mut();
    let cluster = clusters.find(|named| named.name == name);
    cluster?.cluster.as_mut()
}

/// A URL without user and password.
pub(super) fn without_user(url: &str) -> String {
    let (scheme, rest) = url.split_at(url.find("://").map_or(0, |colon| colon + 3));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let mut authority = &rest[..end];
    if let Some((_, port)) = authority.rsplit_once(':')
        && !authority.contains(['@', ']'])
        && !port.chars().all(|c| c.is_ascii_digit())
    {
        // No port: a password in which one of the three was not escaped.
        authority = rest;
    }
    let host = authority.rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}{}", &rest[host..])
}

/// The files that a kubeconfig names and that are read with it, each with its field.
/// A token's may be absent.
fn files(kubeconfig: &Kubeconfig) -> impl Iterator<Item = (&'static str, &String)> {
    let clusters = kubeconfig.clusters.iter();
    let clusters = clusters.filter_map(|named| named.cluster.as_ref());
    let authorities = clusters.filter_map(|cluster| {
        let path = cluster.certificate_authority.as_ref()?;
        Some(("certificate-authority", path))
    });
    let users = kubeconfig.auth_infos.iter();
    let users = users.filter_map(|named| named.auth_info.as_ref());
    let own = users.flat_map(|user| {
        let certificate = user.client_certificate.as_ref();
        let key = user.client_key.as_ref();
        let certificate = certificate.map(|path| ("client-certificate", path));
        certificate
            .into_iter()
            .chain(key.map(|path| ("client-key", path)))
    });
    authorities.chain(own)
}

/// A token as it stands in a file, where an editor may have added the end of a line.
fn token(bytes: Vec<u8>) -> Result<SecretString, String> {
    let text = String::from_utf8(bytes).map_err(|_| "the token is no text".to_owned())?;
    let token = text.trim();
    if token.is_empty() || token.contains(char::is_control) {
        return Err("the token is empty, or more than a line".to_owned());
    }
    Ok(token.into())
}

/// A URL of `apiServer`. `encrypted`: the credentials' own server speaks TLS.
///
/// # Errors
/// In words with a remedy.
pub(crate) fn url(address: &str, encrypted: bool) -> Result<Uri, String> {
    let address = &*without_user(address);
    let wrong =
        |why: &str| format!("apiServer: {address:?} {why}; write it like https://192.0.2.1:6443");
    let url: Uri = address.parse().map_err(|_| wrong("is no URL"))?;
    if url.host().is_none() {
        return Err(wrong("is no URL with https"));
    }
    match url.scheme_str() {
        Some("https") => Ok(url),
        Some("http") if !encrypted => Ok(url),
        Some("http") => Err(wrong("would be sent the credentials in plain text")),
        Some(_) | None => Err(wrong("is no URL with https")),
    }
}
