//! Lists: their parts, rates, tables and JSON.

use expect_test::expect;
use ferrule_api::status::{FrontendRows, PodRows};
use serde_json::Value;

use super::*;

const TEXT: Look = Look {
    width: 100,
    palette: Palette::PLAIN,
};

fn frontend(service: &str, connections: u64, bytes_in: u64) -> FrontendRow {
    FrontendRow {
        service: service.to_owned(),
        port: "http".to_owned(),
        kind: "ClusterIP".to_owned(),
        address: "10.96.0.10:80/TCP".to_owned(),
        action: "balance".to_owned(),
        scheduler: "rr".to_owned(),
        backends: 3,
        programmed: true,
        connections,
        packets_in: connections * 6,
        packets_out: connections * 5,
        bytes_in,
        bytes_out: bytes_in * 20,
    }
}

fn pod(pod: &str, host_interface: &str) -> PodRow {
    PodRow {
        pod: pod.to_owned(),
        container_id: "4f2a9b00c1d24f2a9b00c1d2".to_owned(),
        interface: "eth0".to_owned(),
        network: Some("ferrule".to_owned()),
        addresses: vec!["10.244.1.7".to_owned(), "fd00:10:244:1::7".to_owned()],
        host_interface: host_interface.to_owned(),
        packets_in: 12,
        packets_out: 3,
        bytes_in: 1800,
        bytes_out: 200,
    }
}

/// Both looks, two seconds apart.
fn two_looks<R: Row>(first: Vec<R>, second: Vec<R>) -> Vec<Rated<R>> {
    let began = Instant::now();
    let at = |rows: Vec<R>, at| rows.into_iter().map(|row| Seen { row, at }).collect();
    let first: Vec<_> = at(first, began);
    rated(began, &first, at(second, began + Duration::from_secs(2)))
}

fn some_services() -> Vec<Rated<FrontendRow>> {
    let mut rejecting = frontend("default/empty", 0, 0);
    "reject".clone_into(&mut rejecting.action);
    rejecting.scheduler = String::new();
    rejecting.backends = 0;
    let mut pending = frontend("default/new", 0, 0);
    pending.programmed = false;
    let first = vec![frontend("default/web", 100, 50_000), rejecting.clone()];
    let second = vec![
        rejecting,
        pending,
        frontend("default/web", 2_567, 4_050_000),
    ];
    two_looks(first, second)
}

#[test]
fn services_with_rates() {
    expect![[r"
        SERVICE        PORT  KIND       ADDRESS            SCHEDULER  BACKENDS  STATE    CONNS/S  PKTS IN/S  PKTS OUT/S  BYTES IN/S  BYTES OUT/S
        default/empty  http  ClusterIP  10.96.0.10:80/TCP  -          0         reject         0          0           0         0 B          0 B
        default/new    http  ClusterIP  10.96.0.10:80/TCP  rr         3         pending        0          0           0         0 B          0 B
        default/web    http  ClusterIP  10.96.0.10:80/TCP  rr         3         balance   1.23 k     7.40 k      6.17 k     2.00 MB      40.0 MB
    "]]
    .assert_eq(&table(&some_services(), true, &TEXT));
}

#[test]
fn a_line_that_stands_out_is_coloured_as_a_whole() {
    let look = Look {
        width: 20,
        palette: Palette::COLOURED,
    };
    let text = table(&some_services(), true, &look);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("\u{1b}[36mSERVICE"));
    assert!(lines[1].starts_with("\u{1b}[33mdefault/empty"));
    assert!(lines[2].starts_with("\u{1b}[1m\u{1b}[31mdefault/new"));
    assert!(lines[2].ends_with("0 B\u{1b}[0m"));
    assert!(lines[3].starts_with("default/web"));
    assert_eq!(lines.len(), 4, "rows are never wrapped");
}

#[test]
fn pods_with_totals() {
    let rows: Vec<_> = [pod("default/web-0", "fer1a2b3c4d5e6f"), pod("", "")]
        .into_iter()
        .map(|row| Rated { row, rates: None })
        .collect();
    expect![[r"
        POD            CONTAINER     INTERFACE  ADDRESSES                     HOST END         PKTS IN  PKTS OUT  BYTES IN  BYTES OUT
        default/web-0  4f2a9b00c1d2  eth0       10.244.1.7, fd00:10:244:1::7  fer1a2b3c4d5e6f       12         3   1.80 kB      200 B
        -              4f2a9b00c1d2  eth0       10.244.1.7, fd00:10:244:1::7  -                     12         3   1.80 kB      200 B
    "]]
    .assert_eq(&table(&rows, false, &TEXT));
    assert_eq!(table::<PodRow>(&[], false, &TEXT), "no pods\n");
}

#[test]
fn names_cannot_move_the_cursor_nor_break_the_line() {
    let mut row = frontend("default/\u{1b}[2Jweb\nx", 1, 1);
    row.port = "\u{9b}31m".to_owned();
    let text = table(&[Rated { row, rates: None }], false, &TEXT);
    assert_eq!(text.lines().count(), 2);
    assert!(text.contains(r"default/\u{1b}[2Jweb\nx"));
    assert!(!text.contains(|char: char| char != '\n' && char.is_control()));
}

#[test]
fn a_row_that_was_made_anew_counts_from_zero() {
    let rates = |first, second| two_looks(first, second)[0].rates.clone().unwrap();
    // Connections went down; bytes went up, but not from what they had been.
    let again = rates(vec![frontend("a", 100, 10)], vec![frontend("a", 4, 500)]);
    assert_eq!(again, [2.0, 12.0, 10.0, 250.0, 5000.0]);
    let new = rates(Vec::new(), vec![frontend("a", 4, 500)]);
    assert_eq!(new, again);
    let same = rates(vec![frontend("a", 4, 500)], vec![frontend("a", 4, 500)]);
    assert_eq!(same, [0.0; 5]);
    assert!(two_looks(vec![frontend("a", 4, 500)], Vec::new()).is_empty());
    // A port of the same Service is another row.
    let mut other = frontend("a", 4, 500);
    other.port = "https".to_owned();
    assert_eq!(rates(vec![frontend("a", 100, 10)], vec![other]), again);
}

#[test]
fn no_time_between_two_looks_is_no_rate() {
    let (earlier, later) = (frontend("a", 1, 1), frontend("a", 9, 9));
    assert_eq!(rates(Some(&earlier), &later, Duration::ZERO), [0.0; 5]);
}

#[test]
fn json_has_counters_and_rates() {
    let rows = two_looks(
        vec![frontend("a/b\u{9b}", 1, 100)],
        vec![frontend("a/b\u{9b}", 2, 100)],
    );
    expect![[r#"
        {
          "version": 1,
          "interval": 2.0,
          "services": [
            {
              "service": "a/b\u009b",
              "port": "http",
              "kind": "ClusterIP",
              "address": "10.96.0.10:80/TCP",
              "action": "balance",
              "scheduler": "rr",
              "backends": 3,
              "programmed": true,
              "connections": 2,
              "packetsIn": 12,
              "packetsOut": 10,
              "bytesIn": 100,
              "bytesOut": 2000,
              "rates": {
                "bytesIn": 0.0,
                "bytesOut": 0.0,
                "connections": 0.5,
                "packetsIn": 3.0,
                "packetsOut": 2.5
              }
            }
          ]
        }
    "#]]
    .assert_eq(&json(rows, Duration::from_secs(2)).unwrap());
    let row = pod("", "");
    let once = json(vec![Rated { row, rates: None }], Duration::ZERO).unwrap();
    let once: Value = serde_json::from_str(&once).unwrap();
    assert_eq!(once["interval"], 0.0);
    assert_eq!(once["pods"][0]["packetsIn"], 12);
    assert_eq!(once["pods"][0].get("rates"), None);
    let none = json::<PodRow>(Vec::new(), Duration::ZERO).unwrap();
    let none: Value = serde_json::from_str(&none).unwrap();
    assert_eq!(none["pods"], serde_json::json!([]));
}

/// An agent that gives these parts, one an answer.
fn parts(parts: Vec<(&[&str], Option<&str>)>) -> Result<Vec<String>, StatusError> {
    let mut expected = None;
    let mut parts = parts.into_iter();
    let seen = all_parts::<FrontendRow>(|call| {
        assert_eq!(
            call,
            Call::Frontends {
                after: expected.clone()
            }
        );
        let (services, next) = parts.next().expect("asked on behind the last part");
        expected = next.map(str::to_owned);
        Ok(Answer::Frontends(FrontendRows {
            rows: services.iter().map(|name| frontend(name, 0, 0)).collect(),
            next: expected.clone(),
        }))
    })?;
    Ok(seen.into_iter().map(|seen| seen.row.service).collect())
}

#[test]
fn all_parts_are_asked_for() {
    let list = parts(vec![
        (&["a", "b"], Some("b")),
        (&[], Some("c")),
        (&["d"], None),
    ]);
    assert_eq!(list.unwrap(), ["a", "b", "d"]);
    assert!(parts(vec![(&[], None)]).unwrap().is_empty());
}

#[test]
fn a_list_that_goes_round_is_an_error() {
    for next in ["b", "a", ""] {
        let error = parts(vec![(&["a"], Some("b")), (&["b"], Some(next))]).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("services does not come to its end"), "{said}");
        assert!(said.contains(&format!(
            "after \"b\" says that the next one is after {next:?}"
        )));
    }
}

#[test]
fn a_list_without_an_end_is_an_error() {
    // Nothing in it to be copied a million times.
    let mut row = pod("", "");
    row.container_id = String::new();
    row.interface = String::new();
    row.addresses = Vec::new();
    for rows in [0, 1000] {
        let mut asked = 0_u64;
        let result = all_parts::<PodRow>(|_| {
            asked += 1;
            Ok(Answer::Pods(PodRows {
                rows: vec![row.clone(); rows],
                next: Some(format!("{asked:020}")),
            }))
        });
        let Err(StatusError::TooLong { list }) = result else {
            panic!("it came to an end");
        };
        assert_eq!(list, "pods");
    }
}

#[test]
fn another_answer_is_an_error() {
    let result = all_parts::<PodRow>(|_| Ok(Answer::Frontends(FrontendRows::default())));
    assert!(matches!(result, Err(StatusError::OtherAnswer)));
}
