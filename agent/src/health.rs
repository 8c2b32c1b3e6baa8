//! Health checks of load-balanced Services, over HTTP.
//!
//! A load balancer asks each node whether it has endpoints of a Service whose
//! policy is Local: 200 where it has some of the family by which it is asked, else 503. The answer is made from what the
//! reconciler tells. It is given at the node's addresses that serve node ports, and
//! at the Service's load-balancer VIPs; elsewhere the connection is closed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferrule_api::status::Problem;
use ferrule_model::address::Family;
use ferrule_model::desired::HealthCheck;
use ferrule_model::names::ObjectName;
use hyper::{StatusCode, header};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{error, info};

use crate::http::{self, Answer};
use crate::programming::Programming;
use crate::reconcile::now;

/// Pause before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// What a health check says of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// The Service.
    pub(crate) service: ObjectName,
    /// Its endpoints.
    pub(crate) health: HealthCheck,
}

/// Everything that is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Board {
    /// By port.
    pub(crate) checks: BTreeMap<u16, Check>,
    /// Addresses of the node at which all of them are answered.
    pub(crate) node: BTreeSet<IpAddr>,
    /// VIPs at which one of them is answered.
    pub(crate) vips: BTreeSet<(IpAddr, u16)>,
    /// Whether this node has programmed services, and still can.
    pub(crate) healthy: bool,
}

/// Ports that cannot be served, and why.
pub(crate) type Faults = Arc<Mutex<BTreeMap<u16, (u64, String)>>>;

/// Serves what the board says until the program ends. Where changes wait for too long it is
/// not to be trusted, and nobody else is told the contrary.
pub(crate) async fn run(
    mut board: watch::Receiver<Arc<Board>>,
    faults: Faults,
    programming: Arc<Programming>,
) {
    let mut serving: BTreeMap<u16, JoinHandle<()>> = BTreeMap::new();
    loop {
        let wanted = Arc::clone(&board.borrow_and_update());
        serving.retain(|port, task| {
            let stays = wanted.checks.contains_key(port);
            if !stays {
                task.abort();
                lock(&faults).remove(port);
            }
            stays
        });
        for port in wanted.checks.keys() {
            serving.entry(*port).or_insert_with(|| {
                let (faults, programming) = (Arc::clone(&faults), Arc::clone(&programming));
                tokio::spawn(serve(*port, board.clone(), faults, programming))
            });
        }
        if board.changed().await.is_err() {
            return;
        }
    }
}

/// One port. It is bound at every address, for addresses come and go; who is
/// answered is decided by the address that was called.
async fn serve(
    port: u16,
    board: watch::Receiver<Arc<Board>>,
    faults: Faults,
    programming: Arc<Programming>,
) {
    let listener = loop {
        match http::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
            Ok(listener) => break listener,
            Err(error) => {
                let words = format!("port {port} cannot be served: {error}");
                let new = lock(&faults).insert(port, (now(), words)).is_none();
                if new {
                    error!(port, %error, "a health check cannot be served; free the port");
                }
                sleep(RETRY).await;
            }
        }
    };
    lock(&faults).remove(&port);
    info!(port, "health check is served");
    http::serve(listener, move |request, called| {
        let answer = answer(&board.borrow(), port, called, &programming);
        drop(request);
        async move { answer }
    })
    .await;
}

fn answer(board: &Board, port: u16, called: IpAddr, programming: &Programming) -> Option<Answer> {
    if !board.node.contains(&called) && !board.vips.contains(&(called, port)) {
        return None;
    }
    let check = board.checks.get(&port)?;
    let local_endpoints = check.health.local_endpoints_of(Family::of(called));
    let healthy = board.healthy && programming.health().is_up_to_date;
    let status = if healthy && local_endpoints > 0 {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "service": {"namespace": check.service.namespace, "name": check.service.name},
        "localEndpoints": local_endpoints,
        "serviceProxyHealthy": healthy,
    });
    let mut answer = http::plain(status, body.to_string());
    let headers = answer.headers_mut();
    let json = header::HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    let no_sniff = header::HeaderValue::from_static("nosniff");
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, no_sniff);
    headers.insert(WEIGHT, local_endpoints.into());
    Some(answer)
}

/// By which balancers weigh nodes.
const WEIGHT: header::HeaderName =
    header::HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What does not work, for `status`.
pub(crate) fn problems(faults: &Faults) -> Vec<Problem> {
    let faults = lock(faults);
    let problems = faults.iter().map(|(port, (since, problem))| Problem {
        object: format!("health check at port {port}"),
        problem: problem.clone(),
        remedy: "free the port, or give the Service another healthCheckNodePort; it is tried again by itself".to_owned(),
        since: *since,
        attempts: 0,
    });
    problems.collect()
}

fn lock(faults: &Faults) -> std::sync::MutexGuard<'_, BTreeMap<u16, (u64, String)>> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Instant;

    use tokio::net::TcpListener;

    use super::*;
    use crate::programming::Noticed;

    fn board() -> Board {
        let check = |name: &str, port, ready: &[(Family, usize)]| {
            let health = HealthCheck {
                port,
                ready: ready.iter().copied().collect(),
            };
            let service = ObjectName::new("default", name);
            (port, Check { service, health })
        };
        Board {
            checks: BTreeMap::from([
                check("web", 30_001, &[(Family::IPv4, 2), (Family::IPv6, 1)]),
                check("none", 30_002, &[(Family::IPv4, 0)]),
                check("half", 30_003, &[(Family::IPv4, 1), (Family::IPv6, 0)]),
                check("single", 30_004, &[(Family::IPv4, 1)]),
            ]),
            node: BTreeSet::from([IpAddr::from([192, 0, 2, 1]), V6.into()]),
            vips: BTreeSet::from([(IpAddr::from([203, 0, 113, 7]), 30_001)]),
            healthy: true,
        }
    }

    const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

    fn status(board: &Board, port: u16, ip: impl Into<IpAddr>) -> Option<u16> {
        let programming = Programming::new(Duration::from_secs(30));
        answer(board, port, ip.into(), &programming).map(|answer| answer.status().as_u16())
    }

    #[test]
    fn endpoints_and_health_decide() {
        let mut board = board();
        assert_eq!(status(&board, 30_001, [192, 0, 2, 1]), Some(200));
        assert_eq!(status(&board, 30_002, [192, 0, 2, 1]), Some(503));
        let node = IpAddr::from([192, 0, 2, 1]);
        let programming = Programming::new(Duration::ZERO);
        let well = answer(&board, 30_001, node, &programming).unwrap();
        assert_eq!(well.headers()["x-load-balancing-endpoint-weight"], "2");
        assert_eq!(well.status(), StatusCode::OK);
        // A change has waited for too long: the board may be out of date.
        let noticed = Noticed {
            services: 1,
            slices: 0,
        };
        programming.note_changes(noticed, Instant::now());
        let behind = answer(&board, 30_001, node, &programming).unwrap();
        assert_eq!(behind.status(), StatusCode::SERVICE_UNAVAILABLE);
        board.healthy = false;
        assert_eq!(status(&board, 30_001, [192, 0, 2, 1]), Some(503));
    }

    /// A node port of one family has no endpoint of another, and its balancer asks there.
    #[test]
    fn each_family_answers_for_its_own_endpoints() {
        let board = board();
        let programming = Programming::new(Duration::from_secs(30));
        let weight = |port, ip: IpAddr| {
            let answer = answer(&board, port, ip, &programming).unwrap();
            let weight = &answer.headers()["x-load-balancing-endpoint-weight"];
            (
                answer.status().as_u16(),
                weight.to_str().unwrap().to_owned(),
            )
        };
        let v4 = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(weight(30_001, v4), (200, "2".to_owned()));
        assert_eq!(weight(30_001, V6.into()), (200, "1".to_owned()));
        assert_eq!(weight(30_003, v4), (200, "1".to_owned()));
        assert_eq!(weight(30_003, V6.into()), (503, "0".to_owned()));
        // It has no family to tell apart.
        assert_eq!(weight(30_004, V6.into()), (200, "1".to_owned()));
    }

    #[test]
    fn a_vip_answers_for_its_own_service_only() {
        let board = board();
        assert_eq!(status(&board, 30_001, [203, 0, 113, 7]), Some(200));
        assert_eq!(status(&board, 30_002, [203, 0, 113, 7]), None);
        assert_eq!(status(&board, 30_001, [127, 0, 0, 1]), None);
    }

    #[tokio::test]
    async fn ports_come_and_go_with_the_board() {
        async fn get(port: u16) -> Option<String> {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let to = (Ipv4Addr::LOCALHOST, port);
            let mut stream = tokio::net::TcpStream::connect(to).await.ok()?;
            let request = b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await.ok()?;
            Some(text)
        }
        let free = TcpListener::bind("[::]:0").await.unwrap();
        let port = free.local_addr().unwrap().port();
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let with = |node: &[IpAddr]| {
            let check = Check {
                service: ObjectName::new("default", "web"),
                health: HealthCheck {
                    port,
                    ready: BTreeMap::from([(Family::IPv4, 3)]),
                },
            };
            Arc::new(Board {
                checks: BTreeMap::from([(port, check)]),
                node: node.iter().copied().collect(),
                healthy: true,
                ..Board::default()
            })
        };
        let faults = Faults::default();
        let (tell, told) = watch::channel(with(&[loopback]));
        let programming = Arc::new(Programming::new(Duration::from_secs(30)));
        let server = tokio::spawn(run(told, Arc::clone(&faults), programming));
        while problems(&faults).is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
        assert!(problems(&faults)[0].problem.contains("cannot be served"));
        // The port becomes free: bound again when the Service comes back.
        drop(free);
        tell.send(Arc::default()).unwrap();
        while !problems(&faults).is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
        tell.send(with(&[loopback])).unwrap();
        let text = loop {
            if let Some(text) = get(port).await {
                break text;
            }
            sleep(Duration::from_millis(5)).await;
        };
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let body = r#"{"localEndpoints":3,"service":{"name":"web","namespace":"default"},"serviceProxyHealthy":true}"#;
        assert!(text.ends_with(body), "{text}");
        // At an address that is not the node's it is closed without a word.
        tell.send(with(&[])).unwrap();
        while get(port).await.is_some_and(|text| !text.is_empty()) {
            sleep(Duration::from_millis(5)).await;
        }
        tell.send(Arc::default()).unwrap();
        while get(port).await.is_some() {
            sleep(Duration::from_millis(5)).await;
        }
        server.abort();
    }
}
