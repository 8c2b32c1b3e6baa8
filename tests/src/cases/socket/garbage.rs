//! What a client may send: calls as they should be, calls with something wrong
//! in them, and what never was a call; and what the protocol answers to it.

use anyhow::{bail, ensure};
use ferrule_api::{
    Answer, Call, ErrorCode, HostPort, MAX_LINE, PodName, Reply, Request, TraceRequest, VERSION,
    Wanted, decode, encode,
};
use ferrule_model::address::Protocol;
use ferrule_model::names::{Attachment, ContainerId, IfName};
use ferrule_model::trace::{Question, parse_from, parse_to};
use serde_json::{Value, json};

use crate::random::Random;

/// Containers that ask for addresses: few, so that the ranges never run out by them alone.
const CONTAINERS: usize = 20;

/// Whoever may ask for an address; every call of the protocol.
pub(super) fn call(random: &mut Random) -> anyhow::Result<Call> {
    let cursor = |random: &mut Random| {
        let cursors = [
            "",
            "default\u{1}web\u{1}000003",
            "z",
            "\u{0}",
            "g0\u{0}eth0",
        ];
        random
            .chance(60)
            .then(|| (*random.pick(&cursors)).to_owned())
    };
    Ok(match random.below(6) {
        0 => Call::Allocate(Box::new(Wanted {
            pod: random.chance(50).then(|| PodName {
                namespace: "default".to_owned(),
                name: format!("web-{}", random.below(CONTAINERS)),
            }),
            ports: if random.chance(20) {
                vec![host_port(random); random.below(3)]
            } else {
                Vec::new()
            },
            ..Wanted::new(attachment(random.below(CONTAINERS))?)
        })),
        1 => Call::Release {
            attachment: attachment(random.below(CONTAINERS))?,
        },
        2 => Call::Status,
        3 => Call::Frontends {
            after: cursor(random),
        },
        4 => Call::Trace(Box::new(TraceRequest {
            question: question(random)?,
            live: random.chance(50),
        })),
        _ => Call::Pods {
            after: cursor(random),
        },
    })
}

/// A packet, of whose device little is known.
fn question(random: &mut Random) -> anyhow::Result<Question> {
    let (from, to) = *random.pick(&[
        ("10.244.1.2", "10.96.0.10:80/tcp"),
        ("192.0.2.1", "192.0.2.1:30080/udp"),
        ("fd00:10:244:1::2", "[fd00:10:96::a]:80/sctp"),
    ]);
    let device = random.chance(30).then(|| "uplink".to_owned().try_into());
    Ok(Question::new(
        parse_from(from)?,
        parse_to(to)?,
        device.transpose()?,
    )?)
}

/// A host port, some of which make no sense.
fn host_port(random: &mut Random) -> HostPort {
    let hosts = ["", "0.0.0.0", "::1", "192.0.2.1"];
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    HostPort {
        host_ip: random.pick(&hosts).parse().ok(),
        host_port: *random.pick(&[0, 80, 30_080]),
        container_port: *random.pick(&[0, 8080, 8080]),
        protocol: *random.pick(&protocols),
    }
}

/// The interface of one of the containers.
pub(super) fn attachment(number: usize) -> anyhow::Result<Attachment> {
    Ok(Attachment {
        container_id: ContainerId::try_from(format!("g{number}"))?,
        interface: IfName::try_from("eth0".to_owned())?,
    })
}

/// A call as it should be, as a line.
pub(super) fn valid(random: &mut Random) -> anyhow::Result<Vec<u8>> {
    Ok(encode(&Request::new(call(random)?))?)
}

/// A line that began as a call, mostly; it may still be one.
pub(super) fn mutated(random: &mut Random) -> anyhow::Result<Vec<u8>> {
    let line = valid(random)?;
    Ok(match random.below(10) {
        0 => flipped(line, random),
        1 => {
            let end = random.below(line.len());
            // With its newline or without.
            let newline: &[u8] = if random.chance(50) { b"\n" } else { b"" };
            [&line[..end], newline].concat()
        }
        2 => [&line[..line.len() - 1], &line[..]].concat(),
        3 => {
            let at = random.below(line.len());
            let count = 1 + random.below(20);
            [&line[..at], &random.bytes(count), &line[at..]].concat()
        }
        4 => {
            let bad: [&[u8]; 5] = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88", b"\0"];
            let at = random.below(line.len());
            [&line[..at], *random.pick(&bad), &line[at..]].concat()
        }
        5 => nested(random),
        6 => repeated_key(&line, random),
        _ => with_odd_value(&line, random)?,
    })
}

/// Bytes that are no call at all.
pub(super) fn rubbish(random: &mut Random) -> Vec<u8> {
    match random.below(6) {
        0 => b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        1 => vec![b'\n'; 1 + random.below(5)],
        2 => {
            // Around the longest line, and far beyond it.
            let around = MAX_LINE - 2 + random.below(5);
            let count = *random.pick(&[around, MAX_LINE * 2, MAX_LINE * 5]);
            let newline: &[u8] = if random.chance(50) { b"\n" } else { b"" };
            [&vec![*random.pick(b" x[{\"\0"); count], newline].concat()
        }
        3 => vec![b'\0'; random.below(100)],
        _ => {
            let count = random.below(3000);
            random.bytes(count)
        }
    }
}

fn flipped(mut line: Vec<u8>, random: &mut Random) -> Vec<u8> {
    for _ in 0..=random.below(8) {
        let at = random.below(line.len());
        line[at] ^= 1 << random.below(8);
    }
    line
}

fn nested(random: &mut Random) -> Vec<u8> {
    let open = *random.pick(&["[", "{\"a\":", "[{\"a\":["]);
    let depth = *random.pick(&[10, 127, 128, 129, 5000, 60_000 / open.len()]);
    let close = match (random.chance(50), open) {
        (true, "[") => "]".repeat(depth.min(4000)),
        (_, _) => String::new(),
    };
    let inner = open.repeat(depth);
    format!("{{\"version\":1,\"call\":\"status\",\"x\":{inner}{close}}}\n").into_bytes()
}

/// The first field a second time, behind the others.
fn repeated_key(line: &[u8], random: &mut Random) -> Vec<u8> {
    let again = *random.pick(&[
        &b",\"version\":1}\n"[..],
        b",\"version\":2}\n",
        b",\"call\":\"status\"}\n",
        b",\"call\":\"release\"}\n",
        b",\"after\":null,\"after\":7}\n",
    ]);
    [&line[..line.len() - 2], again].concat()
}

/// One value, at any depth, replaced by something it should not be, or left out.
fn with_odd_value(line: &[u8], random: &mut Random) -> anyhow::Result<Vec<u8>> {
    let mut request: Value = serde_json::from_slice(line)?;
    let mut places = Vec::new();
    collect_places(&request, String::new(), &mut places);
    let place = random.pick(&places).clone();
    // A number that no type holds cannot be had in a `Value`: it is put into the text.
    let huge = *random.pick(&[
        "1e999",
        "-1e999",
        "99999999999999999999999999",
        "-1",
        "4294967296",
    ]);
    let odd = match random.below(9) {
        0 => json!(null),
        1 => json!([]),
        2 => json!({}),
        3 => json!(true),
        4 => json!(1.5),
        5 => json!(""),
        6 => json!("@huge@"),
        _ => json!(long_text(random)),
    };
    if random.chance(10) {
        let (parent, key) = place.rsplit_once('/').unwrap_or_default();
        if let Some(Value::Object(fields)) = request.pointer_mut(parent) {
            fields.remove(key);
        }
    } else if let Some(value) = request.pointer_mut(&place) {
        *value = odd;
    }
    let text = request.to_string().replace("\"@huge@\"", huge);
    Ok(format!("{text}\n").into_bytes())
}

fn collect_places(value: &Value, place: String, places: &mut Vec<String>) {
    if let Value::Object(fields) = value {
        for (key, value) in fields {
            collect_places(value, format!("{place}/{key}"), places);
        }
    }
    if !place.is_empty() {
        places.push(place);
    }
}

/// Texts that are longer when they are told back: what has to be escaped, and escaped again.
fn long_text(random: &mut Random) -> String {
    let piece = *random.pick(&["a", "\\", "\"", "\u{1}", "\u{7f}", "é", "😀", "/", "\n"]);
    let count = *random.pick(&[1, 15, 16, 256, 257, 1000, 9000, 60_000]);
    piece.repeat((count / piece.len()).max(1))
}

/// What the protocol says is answered to these bytes, followed by the end of the connection:
/// for each line the call, or `None` for a `badRequest`, after which nothing more comes.
pub(super) fn answers(mut bytes: &[u8]) -> Vec<Option<Call>> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let most = bytes.len().min(MAX_LINE);
        let newline = bytes[..most].iter().position(|byte| *byte == b'\n');
        let (line, rest) = bytes.split_at(newline.map_or(most, |newline| newline + 1));
        let call = newline
            .and_then(|_| decode::<Request>(line).ok())
            .filter(|request| request.version == VERSION)
            .map(|request| request.call);
        let over = call.is_none();
        answers.push(call);
        if over {
            break;
        }
        bytes = rest;
    }
    answers
}

/// Checks that a line is the reply to a call, or to what was none.
pub(super) fn check_reply(line: &[u8], call: Option<&Call>) -> anyhow::Result<()> {
    ensure!(
        line.last() == Some(&b'\n'),
        "the reply to {call:?} breaks off: {:?}",
        String::from_utf8_lossy(line)
    );
    let reply: Reply = decode(line)?;
    ensure!(reply.version == VERSION, "version {}", reply.version);
    match (call, reply.answer) {
        (None, Answer::Error(error)) if error.code == ErrorCode::BadRequest => {
            ensure!(
                !error.message.is_empty(),
                "a refusal without a word: {error:?}"
            );
        }
        (Some(Call::Allocate(_)), Answer::Allocated(_))
        | (Some(Call::Release { .. }), Answer::Released)
        | (Some(Call::Status), Answer::Status(_))
        | (Some(Call::Frontends { .. }), Answer::Frontends(_))
        | (Some(Call::Pods { .. }), Answer::Pods(_))
        | (Some(Call::Trace(_)), Answer::Trace { .. }) => {}
        (Some(Call::Trace(_)), Answer::Error(error))
            if matches!(error.code, ErrorCode::BadRequest) && error.message.contains("device") => {}
        (Some(Call::Allocate(_)), Answer::Error(error))
            if matches!(error.code, ErrorCode::PoolExhausted | ErrorCode::NotReady) => {}
        (Some(Call::Allocate(_)), Answer::Error(error))
            if matches!(
                error.code,
                ErrorCode::BadRequest | ErrorCode::PortTaken | ErrorCode::Unsupported
            ) && error.message.contains("ort") => {}
        (Some(Call::Status | Call::Frontends { .. } | Call::Trace(_)), Answer::Error(error))
            if error.code == ErrorCode::NotReady => {}
        (call, answer) => bail!("{call:?} was answered with {answer:?}"),
    }
    Ok(())
}
