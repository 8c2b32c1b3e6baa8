//! The capability `portMappings`: ports of the node that are to lead to the pod.
//!
//! They stand in `runtimeConfig`, where the runtime puts what is about one pod.
//! They are read for ADD alone: a pod whose mappings make no sense never came to
//! be, and must be deletable all the same. What the plugin `portmap` takes is
//! taken; what it passes over in silence, or lets through to fail later, is an
//! error that names the field.

use std::net::IpAddr;

use ferrule_api::HostPort;
use ferrule_model::address::Protocol;
use ferrule_model::host_ports::{self, HostPortsError, MAX_HOST_PORTS};
use serde_json::Value;

use crate::failure::{Code, Failure};

/// Reads `runtimeConfig.portMappings`; what is absent or `null` maps nothing.
pub(crate) fn read(mappings: Option<&Value>) -> Result<Vec<HostPort>, Failure> {
    let entries = match mappings {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries,
        Some(_) => {
            return Err(invalid(
                "portMappings",
                "is not a list; give a list of objects",
            ));
        }
    };
    if entries.len() > MAX_HOST_PORTS {
        return Err(failure(&HostPortsError::TooMany(entries.len())));
    }
    let entries = entries.iter().enumerate();
    let ports: Vec<HostPort> = entries
        .map(|(index, entry)| one(index, entry))
        .collect::<Result<_, Failure>>()?;
    host_ports::check(&ports).map_err(|error| failure(&error))?;
    Ok(ports)
}

fn one(index: usize, entry: &Value) -> Result<HostPort, Failure> {
    let at = |field: &str| format!("portMappings[{index}]{field}");
    let Value::Object(fields) = entry else {
        let remedy = "is not an object; give hostPort, containerPort and protocol";
        return Err(invalid(&at(""), remedy));
    };
    let port = |field: &str| {
        let value = fields.get(field);
        let number = value.and_then(Value::as_u64);
        number
            .and_then(|number| u16::try_from(number).ok())
            .filter(|number| *number > 0)
            .ok_or_else(|| {
                let given = value.map_or_else(|| "missing".to_owned(), short);
                let words = format!("is {given}; give a number from 1 to 65535");
                invalid(&at(&format!(".{field}")), &words)
            })
    };
    let text = |field: &str| match fields.get(field) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => {
            let words = format!("is {}; give a text", short(other));
            Err(invalid(&at(&format!(".{field}")), &words))
        }
    };
    Ok(HostPort {
        host_port: port("hostPort")?,
        container_port: port("containerPort")?,
        protocol: protocol(text("protocol")?).ok_or_else(|| {
            let given = fields.get("protocol").map_or_else(String::new, short);
            let words = format!("is {given}; give tcp, udp or sctp");
            invalid(&at(".protocol"), &words)
        })?,
        host_ip: match text("hostIP")? {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                let given = short(&Value::from(text));
                let words = format!("is {given}; give an address of the node, or leave it out");
                invalid(&at(".hostIP"), &words)
            })?),
        },
    })
}

fn protocol(text: &str) -> Option<Protocol> {
    match text.to_ascii_lowercase().as_str() {
        "" | "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        "sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// A value for people; of a long one its beginning.
fn short(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        None => text,
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
    }
}

fn invalid(field: &str, words: &str) -> Failure {
    Failure::new(
        Code::InvalidConfiguration,
        format!("runtimeConfig.{field} {words}"),
    )
}

fn failure(error: &HostPortsError) -> Failure {
    let code = match error {
        HostPortsError::One { fault, .. } if fault.is_unsupported() => Code::UnsupportedField,
        HostPortsError::One { .. } | HostPortsError::TooMany(_) | HostPortsError::Twice { .. } => {
            Code::InvalidConfiguration
        }
    };
    Failure::new(code, format!("runtimeConfig.{error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_runtimes_send() {
        let read = |mappings| read(Some(&mappings)).unwrap();
        assert_eq!(super::read(None).unwrap(), []);
        assert_eq!(read(json!(null)), []);
        assert_eq!(read(json!([])), []);
        let ports = read(json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 8080, "containerPort": 53, "protocol": "UDP", "hostIP": ""},
            {"hostPort": 1, "containerPort": 65535, "hostIP": "192.0.2.1", "name": "web"},
            {"hostPort": 2, "containerPort": 2, "protocol": "", "hostIP": "::"},
        ]));
        let like = |ip: &str, host_port, container_port, protocol| HostPort {
            host_ip: ip.parse().ok(),
            host_port,
            container_port,
            protocol,
        };
        let expected = [
            like("", 8080, 80, Protocol::Tcp),
            like("", 8080, 53, Protocol::Udp),
            like("192.0.2.1", 1, 65535, Protocol::Tcp),
            like("::", 2, 2, Protocol::Tcp),
        ];
        assert_eq!(ports, expected);
    }

    fn refused(mappings: &Value, words: &str) -> Code {
        let failure = read(Some(mappings)).unwrap_err();
        let text = failure.to_string();
        assert!(text.starts_with("runtimeConfig.portMappings"), "{text}");
        assert!(text.contains(words), "{text} has no {words:?}");
        assert!(text.len() < 300, "{text}");
        failure.code()
    }

    /// Field, value, words of the error about the second entry.
    const WRONG: &str = r#"
        hostPort 0 is 0; give a number
        hostPort -1 is -1; give a number
        hostPort 65536 is 65536; give a number
        hostPort "80" is "80"; give a number
        hostPort 1.5 is 1.5; give a number
        hostPort null is null; give a number
        hostPort 1 is 1/TCP, which portMappings[0] has already
        containerPort 0 is 0; give a number
        protocol "icmp" is "icmp"; give tcp, udp or sctp
        protocol 6 is 6; give a text
        hostIP "eth0" is "eth0"; give an address of the node
        hostIP 7 is 7; give a text
        hostIP "ff02::1" is ff02::1, which is not a unicast address
        hostIP "fe80::1" is fe80::1, which is not a unicast address
        hostIP "::ffff:192.0.2.1" is ::ffff:192.0.2.1, which is an IPv4-mapped"#;

    /// Likewise of what only this version does not serve.
    const UNSERVED: &str = r#"
        hostIP "127.0.0.1" is 127.0.0.1, a loopback address
        hostIP "::1" is ::1, a loopback address"#;

    #[test]
    fn wrong_fields_are_named() {
        for (table, code) in [
            (WRONG, Code::InvalidConfiguration),
            (UNSERVED, Code::UnsupportedField),
        ] {
            for line in table.trim().lines() {
                let mut parts = line.trim().splitn(3, ' ');
                let mut part = || parts.next().unwrap();
                let (field, value, words) = (part(), part(), part());
                let mut entry = json!({"hostPort": 8080, "containerPort": 80, "protocol": "tcp"});
                entry[field] = serde_json::from_str(value).unwrap();
                let mappings = json!([{"hostPort": 1, "containerPort": 1}, entry]);
                let words = format!("portMappings[1].{field} {words}");
                assert_eq!(refused(&mappings, &words), code, "{line}");
            }
        }
    }

    #[test]
    fn lists_that_are_none() {
        let long = json!([{"hostPort": 1, "containerPort": 1, "protocol": "x".repeat(1000)}]);
        for (mappings, words) in [
            (json!({}), "portMappings is not a list"),
            (json!("x"), "portMappings is not a list"),
            (json!([7]), "portMappings[0] is not an object"),
            (json!([{}]), "portMappings[0].hostPort is missing"),
            (
                json!(vec![json!(null); 257]),
                "portMappings has 257 entries",
            ),
            (long, "x…; give tcp"),
        ] {
            assert_eq!(refused(&mappings, words), Code::InvalidConfiguration);
        }
    }
}
