//! TLS, credentials that change, and servers that die, over real sockets.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use base64::Engine as _;
use ferrule_api_server::{Acceptor, Authority, Identity, Validity, serve};
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::*;
use crate::source::kubernetes::failure::Cause;
use crate::source::kubernetes::{Credentials, ServiceAccount};

/// What the server is called in the credentials.
const NAME: &str = "api.example";

/// A server that listens on loopback until it is dropped.
struct Listening {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Listening {
    async fn to(server: &Arc<ApiServer>, acceptor: Acceptor) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), server, acceptor).await
    }

    async fn at(address: SocketAddr, server: &Arc<ApiServer>, acceptor: Acceptor) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Arc::clone(server);
        let task = tokio::spawn(async move {
            let _aborted = serve(server, listener, acceptor).await;
        });
        Self { address, task }
    }

    /// Ends, with its connections; its address is free again when this returns.
    async fn dies(mut self) {
        self.task.abort();
        let _aborted = (&mut self.task).await;
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("https://{}", listener.local_addr().unwrap())
}

fn kubeconfig(folder: &Path, server: &str, cluster: &str, user: &str) -> Credentials {
    let path = folder.join("kubeconfig");
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: {server:?}{cluster}}}}}]
users: [{{name: u, user: {{{user}}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
"
    );
    fs::write(&path, text).unwrap();
    Credentials::Kubeconfig(path)
}

/// What is no header's value or no URL ends a client's making, and with it the program.
#[tokio::test]
async fn a_kubeconfig_that_no_client_can_use_is_refused_in_words() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let sound = "https://192.0.2.1:6443";
    for (server, user, says) in [
        (
            sound,
            "token: \"a\\nb\"",
            "token: the token is empty, or more than a line",
        ),
        ("192.0.2.1:6443", "token: secret", "is no URL with https"),
        ("ftp://192.0.2.1", "token: secret", "is no URL with https"),
    ] {
        let credentials = kubeconfig(folder, server, "", user);
        let Err(error) = credentials.read(false).await else {
            panic!("{server} {user}");
        };
        assert!(error.contains(says), "{server} {user}: {error}");
    }
}

/// The client would find them later, and would name neither file nor field.
#[tokio::test]
async fn faults_of_a_kubeconfig_are_named_with_file_and_field() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let sound = "https://192.0.2.1:6443";
    let identity = Authority::new("test").unwrap();
    let identity = identity.signs(&[NAME], Validity::Now).unwrap();
    write_identity(folder, &identity);
    let no_certificate = format!(", certificate-authority-data: {:?}", base64("no PEM"));
    let pem = "-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n";
    let bad_certificate = format!(", certificate-authority-data: {:?}", base64(pem));
    for (cluster, user, says) in [
        (&*no_certificate, "token: x", "certificate-authority-data"),
        (&*bad_certificate, "token: x", "certificate-authority-data"),
        (
            ", tls-server-name: a b",
            "token: x",
            "tls-server-name: \"a b\"",
        ),
        (
            "",
            "client-certificate: client.crt",
            "client-certificate and no client-key",
        ),
        (
            "",
            "client-key: client.key",
            "client-key and no client-certificate",
        ),
    ] {
        let credentials = kubeconfig(folder, sound, cluster, user);
        let error = credentials.read(false).await.err();
        let error = error.unwrap_or_else(|| panic!("{cluster} {user}"));
        assert!(error.contains(says), "{cluster} {user}: {error}");
        assert!(error.contains("/kubeconfig: "), "{cluster} {user}: {error}");
    }
    // What is empty was not given.
    let empty = ", tls-server-name: '', proxy-url: ''";
    let credentials = kubeconfig(folder, sound, empty, "token: x");
    let config = credentials.read(false).await.unwrap();
    assert_eq!(config.tls_server_name, None);
    let credentials = kubeconfig(folder, sound, "", "token: x");
    let path = folder.join("kubeconfig");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("user: u}", "user: other}")).unwrap();
    let error = credentials.read(false).await.err().unwrap();
    assert!(error.contains("the user \"other\""), "{error}");
    assert!(error.contains("/kubeconfig: "), "{error}");
}

#[tokio::test]
async fn a_password_in_a_url_is_not_shown() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let credentials = kubeconfig(folder, "http://me:pass@word@192.0.2.1:6443", "", "token: x");
    let servers = Servers::open(&credentials, &[]).await.unwrap();
    assert_eq!(servers.addresses(), "http://192.0.2.1:6443");
    let address = "http://me:pass@192.0.2.2:6443/a@b".to_owned();
    let servers = Servers::open(&credentials, &[address]).await.unwrap();
    let addresses = servers.addresses();
    assert_eq!(addresses, "http://192.0.2.2:6443/a@b");
    for server in [
        "ftp://me:pass@192.0.2.1",
        "ftp://me:wo/pass@192.0.2.1",
        "me:pass@192.0.2.1:6443",
    ] {
        let credentials = kubeconfig(folder, server, "", "token: x");
        let error = credentials.read(false).await.err().unwrap();
        assert!(!error.contains("pass"), "{error}");
        let credentials = kubeconfig(folder, "http://192.0.2.1", "", "token: x");
        let error = Servers::open(&credentials, &[server.to_owned()]).await;
        let error = error.err().unwrap();
        assert!(!error.contains("pass"), "{error}");
    }
}

fn base64(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn service_account(folder: &Path, authority: &Authority, token: &str) -> Credentials {
    fs::write(folder.join("ca.crt"), authority.certificate()).unwrap();
    fs::write(folder.join("token"), token).unwrap();
    Credentials::ServiceAccount(ServiceAccount {
        folder: folder.to_owned(),
        address: None,
    })
}

fn write_identity(folder: &Path, identity: &Identity) {
    fs::write(folder.join("client.crt"), &identity.certificate).unwrap();
    fs::write(folder.join("client.key"), &identity.key).unwrap();
}

fn a_server() -> Arc<ApiServer> {
    let server = ApiServer::new(Streaming::Served);
    server.put(node("a", 1)).unwrap();
    server
}

/// Follows a server to its end, over TLS.
async fn followed(server: &ApiServer, credentials: &Credentials, addresses: &[String]) {
    let servers = Servers::open(credentials, addresses).await.unwrap();
    let mut listener = Listener::new(servers);
    let equal = timeout(Duration::from_secs(20), listener.until_equal(server));
    assert!(equal.await.is_ok(), "{:#?}", listener.report);
    assert_eq!(listener.report, Report::default());
}

/// Asks once.
async fn asked(credentials: &Credentials, addresses: &[String]) -> super::super::failure::Failure {
    let servers = Servers::open(credentials, addresses).await.unwrap();
    let answer = servers.get("/api/v1/nodes").await;
    answer.err().expect("it cannot be trusted")
}

#[tokio::test]
async fn whom_to_trust_is_said_in_every_usual_way() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let authority = Authority::new("test").unwrap();
    let identity = authority
        .signs(
            &[NAME, "kubernetes.default.svc", "127.0.0.1", "fd00::1"],
            Validity::Now,
        )
        .unwrap();
    let server = a_server();
    server.set_token(Some("secret"));
    let open = Listening::to(&server, identity.acceptor(None).unwrap()).await;
    let strict = Listening::to(&server, identity.acceptor(Some(&authority)).unwrap()).await;
    fs::write(folder.join("ca.pem"), authority.certificate()).unwrap();
    fs::write(folder.join("token.txt"), "secret").unwrap();
    let inline = format!(
        ", certificate-authority-data: {:?}",
        base64(&authority.certificate())
    );

    // The authority inline, the token inline, the server's address in its certificate.
    let credentials = kubeconfig(folder, &open.url(), &inline, "token: secret");
    followed(&server, &credentials, &[]).await;
    // Both as files beside the kubeconfig.
    let file = ", certificate-authority: ca.pem";
    let credentials = kubeconfig(folder, &open.url(), file, "tokenFile: token.txt");
    followed(&server, &credentials, &[]).await;
    // Certificates are for the name in the kubeconfig, whatever address is asked.
    let named = format!("https://{NAME}:6443");
    let credentials = kubeconfig(folder, &named, file, "tokenFile: token.txt");
    followed(&server, &credentials, &[open.url()]).await;
    // Or for the name that it gives beside the address; an IPv6 one here.
    let other = format!("{file}, tls-server-name: {NAME}");
    let credentials = kubeconfig(folder, "https://[::1]:6443", &other, "tokenFile: token.txt");
    followed(&server, &credentials, &[open.url()]).await;
    let credentials = kubeconfig(folder, "https://[fd00::1]:6443", file, "token: secret");
    followed(&server, &credentials, &[open.url()]).await;
    // A service account.
    let account = service_account(folder, &authority, "secret");
    followed(&server, &account, &[open.url()]).await;

    // A certificate of our own, inline and as files.
    server.set_token(None);
    write_identity(folder, &identity);
    let files = "client-certificate: client.crt, client-key: client.key";
    let credentials = kubeconfig(folder, &strict.url(), &inline, files);
    followed(&server, &credentials, &[]).await;
    let data = format!(
        "client-certificate-data: {:?}, client-key-data: {:?}",
        base64(&identity.certificate),
        base64(&identity.key)
    );
    let credentials = kubeconfig(folder, &strict.url(), &inline, &data);
    followed(&server, &credentials, &[]).await;
}

#[tokio::test]
async fn who_cannot_be_trusted_is_named_and_told_nothing() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let (ours, other) = (
        Authority::new("ours").unwrap(),
        Authority::new("other").unwrap(),
    );
    let server = a_server();
    let ca = ", certificate-authority: ca.crt";
    fs::write(folder.join("ca.crt"), ours.certificate()).unwrap();
    let credentials = kubeconfig(folder, &format!("https://{NAME}"), ca, "token: secret");
    let sign = |authority: &Authority, name: &str, validity| {
        let identity = authority.signs(&[name], validity).unwrap();
        identity.acceptor(None).unwrap()
    };
    let mutual = ours.signs(&[NAME], Validity::Now).unwrap();
    let mutual = mutual.acceptor(Some(&ours)).unwrap();
    for (acceptor, words, remedy) in [
        (
            sign(&other, NAME, Validity::Now),
            "its certificate is not signed by the certificate authority of the credentials",
            "certificate-authority",
        ),
        (
            sign(&ours, NAME, Validity::Past),
            "its certificate expired ",
            "renew the server's certificate",
        ),
        (
            sign(&ours, NAME, Validity::Future),
            "its certificate is not valid yet",
            "clock",
        ),
        (
            sign(&ours, "other.example", Validity::Now),
            "its certificate is not for api.example but for other.example",
            "tls-server-name",
        ),
        (
            mutual,
            "it does not accept our certificate (CertificateRequired)",
            "client-certificate",
        ),
        (Acceptor::Plain, "does not speak TLS", "port"),
    ] {
        let listening = Listening::to(&server, acceptor).await;
        let failure = asked(&credentials, &[listening.url()]).await;
        let expected = format!("{}: ", listening.url());
        assert!(failure.words.starts_with(&expected), "{failure:?}");
        assert!(failure.words.contains(words), "{failure:?}");
        assert!(failure.remedy.contains(remedy), "{failure:?}");
        assert_eq!(failure.cause, Cause::Untrusted);
    }
    assert_eq!(server.requests(), 0, "somebody was told something");
}

#[tokio::test]
async fn what_is_wrong_with_credentials_is_said_before_anybody_is_asked() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let authority = Authority::new("test").unwrap();
    let refused = async |credentials: &Credentials, addresses: &[&str]| {
        let addresses: Vec<String> = addresses.iter().map(|text| (*text).to_owned()).collect();
        let servers = Servers::open(credentials, &addresses).await;
        servers.err().expect("these are no credentials")
    };
    let https = "https://192.0.2.1:6443";
    let exec = "exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/false}";
    let said = refused(&kubeconfig(folder, https, "", exec), &[]).await;
    assert!(said.contains("runs no program"), "{said}");
    let proxy = ", proxy-url: \"http://192.0.2.9:3128\"";
    let said = refused(&kubeconfig(folder, https, proxy, "token: x"), &[]).await;
    assert!(said.contains("proxy-url"), "{said}");
    let missing = ", certificate-authority: nowhere.pem";
    let said = refused(&kubeconfig(folder, https, missing, "token: x"), &[]).await;
    assert!(said.contains("nowhere.pem"), "{said}");

    let account = service_account(folder, &authority, "secret");
    let said = refused(&account, &["http://192.0.2.1:6443"]).await;
    assert!(said.contains("in plain text"), "{said}");
    let said = refused(&account, &["192.0.2.1:6443"]).await;
    assert!(said.contains("https://192.0.2.1:6443"), "{said}");
    let said = refused(&account, &[]).await;
    assert!(said.contains("KUBERNETES_SERVICE_HOST"), "{said}");
    fs::remove_file(folder.join("token")).unwrap();
    let said = refused(&account, &[https]).await;
    assert!(said.contains("/token: "), "{said}");
}

/// The only address is that of a Service which nobody has programmed.
#[tokio::test]
async fn without_servers_it_is_said_that_they_are_needed() {
    let folder = TempDir::new().unwrap();
    let authority = Authority::new("test").unwrap();
    service_account(folder.path(), &authority, "secret");
    let account = Credentials::ServiceAccount(ServiceAccount {
        folder: folder.path().to_owned(),
        address: Some(nobody().await),
    });
    let failure = asked(&account, &[]).await;
    assert!(failure.remedy.contains("apiServer"), "{failure:?}");
    assert!(failure.words.contains(": client error"), "{failure:?}");
    let failure = asked(&account, &[nobody().await]).await;
    assert!(!failure.remedy.contains("apiServer"), "{failure:?}");
}

/// The tokens of service accounts last an hour, authorities and certificates a
/// year: what replaces them on the disk is found without a restart, and nothing
/// is listed anew.
#[tokio::test]
async fn rotated_credentials_are_found() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let authority = Authority::new("first").unwrap();
    let names = ["kubernetes.default.svc"];
    let identity = authority.signs(&names, Validity::Now).unwrap();
    let server = a_server();
    server.set_token(Some("first"));
    let listening = Listening::to(&server, identity.acceptor(None).unwrap()).await;
    let account = service_account(folder, &authority, "first");
    let address = listening.address;
    let servers = Servers::open(&account, &[listening.url()]).await.unwrap();
    let mut listener = Listener::new(servers);
    within("the start", listener.until_equal(&server)).await;
    let lists = server.lists();

    // The old token has expired, the new one comes a moment later.
    server.set_token(Some("second"));
    server.end_watches();
    let away = async {
        while listener.report.troubles.is_empty() {
            listener.listen(Duration::from_millis(50)).await;
        }
    };
    within("that it is away", away).await;
    let trouble = &listener.report.troubles[0];
    assert!(trouble.problem.contains("401"), "{trouble:?}");
    server.put(node("b", 2)).unwrap();
    fs::write(folder.join("fresh"), "second\n").unwrap();
    fs::rename(folder.join("fresh"), folder.join("token")).unwrap();
    within("the second token", listener.until_equal(&server)).await;
    assert_eq!(server.lists(), lists, "everything was listed anew");

    // The servers get certificates of another authority, then the node its certificate.
    listening.dies().await;
    let authority = Authority::new("second").unwrap();
    let identity = authority.signs(&names, Validity::Now).unwrap();
    let _listening = Listening::at(address, &server, identity.acceptor(None).unwrap()).await;
    listener.listen(Duration::from_secs(2)).await;
    fs::write(folder.join("ca.crt"), authority.certificate()).unwrap();
    server.put(node("c", 3)).unwrap();
    within("the second authority", listener.until_equal(&server)).await;
    assert_eq!(listener.gone, []);
    assert_eq!(server.lists(), lists, "everything was listed anew");
}

/// A token is not used until it is refused.
#[tokio::test(start_paused = true)]
async fn old_credentials_are_read_anew_unasked() {
    let folder = TempDir::new().unwrap();
    let authority = Authority::new("test").unwrap();
    let account = service_account(folder.path(), &authority, "first");
    let addresses = ["https://192.0.2.1:6443".to_owned()];
    let servers = Servers::open(&account, &addresses).await.unwrap();
    let made = servers.made();
    tokio::time::advance(Duration::from_mins(4)).await;
    servers.renew_if_old().await;
    assert_eq!(servers.made(), made, "too early");
    tokio::time::advance(Duration::from_mins(2)).await;
    fs::write(folder.path().join("token"), "").unwrap();
    servers.renew_if_old().await;
    assert_eq!(servers.made(), made, "half written");
    tokio::time::advance(Duration::from_mins(6)).await;
    fs::write(folder.path().join("token"), "second").unwrap();
    servers.renew_if_old().await;
    assert_ne!(servers.made(), made, "not read anew");
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_dies() {
    let folder = TempDir::new().unwrap();
    let authority = Authority::new("test").unwrap();
    let names = ["kubernetes.default.svc"];
    let identity = authority.signs(&names, Validity::Now).unwrap();
    let account = service_account(folder.path(), &authority, "secret");
    let server = a_server();
    let first = Listening::to(&server, identity.acceptor(None).unwrap()).await;
    let second = Listening::to(&server, identity.acceptor(None).unwrap()).await;
    // One is dead at the start, one is of another cluster.
    let foreign = Authority::new("foreign").unwrap();
    let foreign = foreign.signs(&names, Validity::Now).unwrap();
    let foreign = Listening::to(&server, foreign.acceptor(None).unwrap()).await;
    let addresses = [nobody().await, foreign.url(), first.url(), second.url()];
    let servers = Servers::open(&account, &addresses).await.unwrap();
    let mut listener = Listener::new(servers);
    within("the first", listener.until_equal(&server)).await;
    let lists = server.lists();
    // It dies with the watches on it.
    first.dies().await;
    server.put(node("b", 2)).unwrap();
    within("the second", listener.until_equal(&server)).await;
    assert_eq!(server.lists(), lists, "everything was listed anew");
    assert_eq!(listener.gone, []);
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = timeout(Duration::from_secs(30), work).await;
    done.unwrap_or_else(|_| panic!("{what}: not within half a minute"))
}
