//! The socket against the real kernel, each test in a network namespace of its own.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ferrule_netlink::{Error, MAX_BATCH, Monitor, Protocol, RawMessage, Socket, generic, route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Index of the loopback device in every namespace.
const LOOPBACK: u32 = 1;

fn in_namespace<T: Send + 'static, F>(test: impl FnOnce() -> F + Send + 'static) -> T
where
    F: Future<Output = T>,
{
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes; no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test())
    });
    thread.join().unwrap()
}

fn address(number: u32) -> RawMessage {
    let ip = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number));
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = LOOPBACK;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    route::encode(RouteNetlinkMessage::NewAddress(message))
}

fn all_addresses() -> RawMessage {
    route::encode(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
}

const MAKE: u16 = NLM_F_CREATE | NLM_F_EXCL;

#[test]
fn a_long_batch_has_a_result_for_each_message_and_a_dump_has_all() {
    in_namespace(|| async {
        let count = MAX_BATCH * 8 + 3;
        let socket = Socket::open(Protocol::Route).unwrap();
        let mut batch: Vec<_> = (1..=u32::try_from(count).unwrap())
            .map(|number| (address(number), MAKE))
            .collect();
        // The same twice, and one for a device that does not exist.
        batch.insert(500, (address(17), MAKE));
        let mut lost = AddressMessage::default();
        lost.header.family = AddressFamily::Inet;
        lost.header.prefix_len = 32;
        lost.header.index = 4711;
        lost.attributes = vec![AddressAttribute::Local(Ipv4Addr::new(10, 9, 9, 9).into())];
        let lost = route::encode(RouteNetlinkMessage::NewAddress(lost));
        batch.insert(700, (lost, MAKE));
        let results = socket.batch(batch).await;
        assert_eq!(results.len(), count + 2);
        for (index, result) in results.iter().enumerate() {
            match index {
                500 => assert!(result.as_ref().is_err_and(Error::already_exists)),
                700 => assert!(result.as_ref().is_err_and(Error::is_not_found)),
                _ => assert!(result.is_ok(), "{index}: {result:?}"),
            }
        }
        assert_eq!(socket.dump(all_addresses()).await.unwrap().len(), count);
    });
}

#[test]
fn a_refusal_says_why() {
    in_namespace(|| async {
        let socket = Socket::open(Protocol::Route).unwrap();
        let unknown = RawMessage::new(9999, vec![0; 16]);
        let error = socket.request(unknown, 0).await.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::OPNOTSUPP));
        assert!(!error.leaves_doubt());
        let generic = Socket::open(Protocol::Generic).unwrap();
        let error = generic::family(&generic, "no-such-thing")
            .await
            .unwrap_err();
        assert!(error.is_not_found(), "{error}");
        assert!(generic::family(&generic, "nlctrl").await.is_ok());
    });
}

#[test]
fn what_takes_too_long_leaves_doubt() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes; no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root");
        // The connection lives in a runtime that does not run: nobody answers.
        let (sleeping, awake) = (runtime(), runtime());
        let mut socket = sleeping
            .block_on(async { Socket::open(Protocol::Route) })
            .unwrap();
        socket.set_timeout(Duration::from_millis(20));
        awake.block_on(async {
            let error = socket.request(address(1), MAKE).await.unwrap_err();
            assert!(matches!(error, Error::Timeout(_)), "{error}");
            assert!(error.leaves_doubt());
            let results = socket.batch(vec![(address(2), MAKE); 300]).await;
            assert_eq!(results.len(), 300);
            assert!(
                results
                    .iter()
                    .all(|r| r.as_ref().is_err_and(Error::leaves_doubt))
            );
            assert!(
                socket
                    .dump(all_addresses())
                    .await
                    .unwrap_err()
                    .leaves_doubt()
            );
        });
        // It wakes up: answers that come too late are not taken for those of the next request.
        socket.set_timeout(Duration::from_secs(10));
        sleeping.block_on(async {
            let error = socket.request(address(1), MAKE).await.unwrap_err();
            assert!(error.already_exists(), "{error}");
            socket.request(address(3), MAKE).await.unwrap();
            assert_eq!(socket.dump(all_addresses()).await.unwrap().len(), 3);
        });
    });
    thread.join().unwrap();
}

#[test]
fn a_transaction_is_all_or_nothing() {
    in_namespace(|| async {
        let socket = Socket::open(Protocol::Netfilter).unwrap();
        // NFT_MSG_NEWTABLE of family inet; the second one deletes a table that is not there.
        let table = |kind: u16, name: &str| {
            let mut body = vec![1, 0, 0, 0];
            let length = u16::try_from(4 + name.len() + 1).unwrap();
            body.extend(length.to_ne_bytes());
            body.extend(1_u16.to_ne_bytes());
            body.extend(name.bytes().chain([0]));
            (RawMessage::new((10 << 8) | kind, body), NLM_F_CREATE)
        };
        let error = socket
            .transaction(vec![table(0, "abc"), table(2, "nothere")])
            .await;
        assert!(error.unwrap_err().is_not_found());
        let results = socket
            .transaction_each(vec![
                table(2, "nothere"),
                table(0, "abc"),
                table(2, "nor-this"),
            ])
            .await
            .unwrap();
        let refused: Vec<bool> = results.iter().map(Result::is_err).collect();
        assert_eq!(refused, [true, false, true]);
        let list = || RawMessage::new((10 << 8) | 1, vec![1, 0, 0, 0]);
        assert_eq!(socket.dump(list()).await.unwrap(), vec![]);
        socket
            .transaction(vec![table(0, "abc"), table(0, "def")])
            .await
            .unwrap();
        assert_eq!(socket.dump(list()).await.unwrap().len(), 2);
    });
}

#[test]
fn a_monitor_hears_of_addresses_that_come_and_go() {
    in_namespace(|| async {
        let mut monitor = Monitor::open().unwrap();
        let socket = Socket::open(Protocol::Route).unwrap();
        // Nothing has happened, and a wait that is given up takes nothing.
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, monitor.next()).await.is_err());
        socket.request(address(1), MAKE).await.unwrap();
        let mut gone = address(1);
        gone.message_type += 1;
        socket.request(gone, 0).await.unwrap();
        // The device is down, so that no route comes or goes with its address.
        let mut heard = Vec::new();
        while heard.len() < 2 {
            let news = tokio::time::timeout(Duration::from_secs(5), monitor.next()).await;
            for message in news.unwrap().unwrap() {
                let (kind, message) = match message {
                    RouteNetlinkMessage::NewAddress(message) => ("new", message),
                    RouteNetlinkMessage::DelAddress(message) => ("gone", message),
                    _ => continue,
                };
                let ip = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
                assert!(message.attributes.contains(&AddressAttribute::Local(ip)));
                heard.push(kind);
            }
        }
        assert_eq!(heard, ["new", "gone"]);
        assert!(tokio::time::timeout(soon, monitor.next()).await.is_err());
    });
}
