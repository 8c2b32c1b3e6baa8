//! The network configuration on standard input.
//!
//! Only the fields that we use are looked at: a runtime adds others, and a
//! fault in one of those is no reason to leave a pod undeletable.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use ferrule_model::names::{Attachment, ContainerId, IfName, NetworkName};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bandwidth::Asked;
use crate::failure::{Code, Failure};
use crate::version::SpecVersion;

/// Most bytes that are read from standard input.
const MAX_INPUT: u64 = 1024 * 1024;

/// Smallest MTU that IPv4 allows (RFC 791), largest of a veth.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

/// Longest path of a Unix socket, in bytes: `sun_path` without the zero at its end.
const MAX_SOCKET: usize = 107;

/// Smallest MTU that IPv6 allows (RFC 8200).
pub(crate) const MIN_MTU_IPV6: u32 = 1280;

/// A network configuration, as far as every verb needs it. What one verb alone
/// needs is checked when that verb asks, so that a mistake there leaves pods
/// deletable.
#[derive(Debug)]
pub(crate) struct Config {
    /// Format of the result.
    pub(crate) version: SpecVersion,
    /// Where the agent listens.
    pub(crate) agent_socket: PathBuf,
    /// Where releases wait for the agent.
    pub(crate) state_dir: PathBuf,
    /// Result of the plugin before us, or of ADD to CHECK and DEL.
    pub(crate) previous: Option<Value>,
    /// `runtimeConfig.portMappings` as it stands there; see [`crate::ports`].
    pub(crate) port_mappings: Option<Value>,
    /// Limits of bandwidth, not looked at yet.
    pub(crate) bandwidth: Asked,
    /// All of it.
    object: Value,
}

/// What every verb needs.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    agent_socket: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    prev_result: Option<Value>,
}

/// An interface of a container, as GC's list has it.
#[derive(Deserialize)]
struct WireAttachment {
    #[serde(rename = "containerID")]
    container_id: ContainerId,
    ifname: IfName,
}

/// The list of what is in use; the second name is what libcni 1.2.0 called it.
const VALID_ATTACHMENTS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

/// Reads standard input, or whatever stands in for it, to its end.
pub(crate) fn read_input(input: impl Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    input
        .take(MAX_INPUT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::new(Code::Io, format!("cannot read standard input: {error}")))?;
    if bytes.len() as u64 > MAX_INPUT {
        return Err(Failure::new(
            Code::Decode,
            format!("the network configuration is longer than {MAX_INPUT} bytes"),
        ));
    }
    Ok(bytes)
}

impl Config {
    /// Checks the configuration.
    pub(crate) fn parse(input: &[u8]) -> Result<Self, Failure> {
        let object: Value = serde_json::from_slice(input).map_err(|error| {
            Failure::new(
                Code::Decode,
                format!("the network configuration on standard input is no JSON: {error}"),
            )
        })?;
        // The version first: errors about the rest may depend on it.
        let version = SpecVersion::parse(object.get("cniVersion"))?;
        let wire: Wire = typed("", &object)?;
        Ok(Self {
            version,
            agent_socket: absolute(
                "agentSocket",
                wire.agent_socket,
                ferrule_api::DEFAULT_SOCKET,
            )?,
            state_dir: absolute("stateDir", wire.state_dir, ferrule_api::DEFAULT_STATE_DIR)?,
            previous: wire.prev_result,
            port_mappings: object.pointer("/runtimeConfig/portMappings").cloned(),
            bandwidth: Asked::of(&object),
            object,
        })
    }

    /// Whether a socket can have the path of `agentSocket`. DEL does not ask: it goes on
    /// without the agent.
    pub(crate) fn check_socket(&self) -> Result<(), Failure> {
        let length = self.agent_socket.as_os_str().len();
        if length <= MAX_SOCKET {
            return Ok(());
        }
        Err(invalid(format!(
            "agentSocket of the network configuration has {length} bytes: a socket's path has {MAX_SOCKET} at most; give a shorter one, here and to the agent (--socket)"
        )))
    }

    /// Name of the network, which every list has to have.
    pub(crate) fn network(&self) -> Result<NetworkName, Failure> {
        let name: Option<NetworkName> = self.field("name")?;
        name.ok_or_else(|| {
            invalid("name of the network configuration is missing: give the list one, such as \"ferrule\"".to_owned())
        })
    }

    /// MTU to use instead of the agent's, in bytes.
    pub(crate) fn mtu(&self) -> Result<Option<u32>, Failure> {
        let mtu: Option<u32> = self.field("mtu")?;
        match mtu {
            Some(mtu) if !MTU_RANGE.contains(&mtu) => Err(invalid(format!(
                "mtu of the network configuration is {mtu}: it must be 68 to 65535"
            ))),
            mtu => Ok(mtu),
        }
    }

    /// What GC leaves alone. `null` is an empty list: so libcni writes it.
    pub(crate) fn valid_attachments(&self) -> Result<BTreeSet<Attachment>, Failure> {
        let given = VALID_ATTACHMENTS
            .into_iter()
            .filter(|name| self.object.get(name).is_some());
        let given: Vec<&str> = given.collect();
        if given.is_empty() {
            return Err(invalid(format!(
                "{} is missing from the network configuration: without it GC cannot know what is in use",
                VALID_ATTACHMENTS[0]
            )));
        }
        // Where both names are given, what either lists is in use.
        let mut valid = BTreeSet::new();
        for name in given {
            let list: Option<Vec<WireAttachment>> = self.field(name)?;
            valid.extend(list.unwrap_or_default().into_iter().map(|wire| Attachment {
                container_id: wire.container_id,
                interface: wire.ifname,
            }));
        }
        Ok(valid)
    }

    /// A field that one verb needs; absent and `null` are the same.
    pub(crate) fn field<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Failure> {
        match self.object.get(name) {
            None => Ok(None),
            Some(value) => typed(name, value),
        }
    }

    /// The version in an input that [`Config::parse`] may have refused.
    pub(crate) fn version_of(input: &[u8]) -> SpecVersion {
        serde_json::from_slice::<Value>(input)
            .ok()
            .and_then(|input| SpecVersion::parse(input.get("cniVersion")).ok())
            .unwrap_or(SpecVersion::NEWEST)
    }
}

/// A part of the configuration, or an error that names the field.
pub(crate) fn typed<T: DeserializeOwned>(name: &str, value: &Value) -> Result<T, Failure> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let dot = if name.is_empty() || path.starts_with('[') {
            ""
        } else {
            "."
        };
        let field = match path.as_str() {
            "." | "?" => name.to_owned(),
            path => format!("{name}{dot}{path}"),
        };
        let field = if field.is_empty() {
            "it".to_owned()
        } else {
            field
        };
        invalid(format!(
            "{field} of the network configuration is not understood: {}",
            shortened(&error.into_inner().to_string())
        ))
    })
}

pub(crate) fn invalid(message: String) -> Failure {
    Failure::new(Code::InvalidConfiguration, message)
}

/// It quotes what came, and that may be long.
fn shortened(text: &str) -> String {
    text.chars().take(256).collect()
}

/// A path that does not depend on the folder in which the runtime starts us.
fn absolute(field: &str, given: Option<PathBuf>, default: &str) -> Result<PathBuf, Failure> {
    let path = given.unwrap_or_else(|| Path::new(default).to_owned());
    if path.is_absolute() {
        return Ok(path);
    }
    Err(invalid(format!(
        "{field} of the network configuration is {:?}: it must be an absolute path",
        shortened(&path.to_string_lossy())
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_strangers() {
        let config = Config::parse(
            br#"{"cniVersion":"1.0.0","name":"n","type":"ferrule","ipMasq":"odd",
                "runtimeConfig":{"portMappings":[{"protocol":"sctp"}]}}"#,
        )
        .unwrap();
        assert_eq!(config.agent_socket, Path::new(ferrule_api::DEFAULT_SOCKET));
        assert_eq!(config.state_dir, Path::new(ferrule_api::DEFAULT_STATE_DIR));
        assert_eq!(config.mtu().unwrap(), None);
        assert_eq!(config.network().unwrap().as_str(), "n");
    }

    #[test]
    fn wrong_fields_are_named() {
        for (input, code, word) in [
            ("", Code::Decode, "JSON"),
            ("[]", Code::IncompatibleVersion, "missing"),
            ("{}", Code::IncompatibleVersion, "missing"),
            (r#"{"cniVersion":"9"}"#, Code::IncompatibleVersion, "\"9\""),
            (
                r#"{"cniVersion":"1.0.0","stateDir":"a"}"#,
                Code::InvalidConfiguration,
                "stateDir",
            ),
            (
                r#"{"cniVersion":"1.0.0","agentSocket":""}"#,
                Code::InvalidConfiguration,
                "agentSocket",
            ),
        ] {
            let failure = Config::parse(input.as_bytes()).unwrap_err();
            assert_eq!(failure.code(), code, "{input}: {failure}");
            assert!(failure.to_string().contains(word), "{input}: {failure}");
        }
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_named() {
        let with = |length: usize| {
            let path = format!("/{}", "a".repeat(length - 1));
            let text = format!(r#"{{"cniVersion":"1.1.0","agentSocket":"{path}"}}"#);
            Config::parse(text.as_bytes()).unwrap().check_socket()
        };
        assert_eq!(with(MAX_SOCKET), Ok(()));
        let failure = with(MAX_SOCKET + 1).unwrap_err();
        assert_eq!(failure.code(), Code::InvalidConfiguration);
        assert!(
            failure.to_string().starts_with("agentSocket of"),
            "{failure}"
        );
    }

    /// What one verb needs is no matter of the others, and is named there.
    #[test]
    fn fields_of_one_verb_are_checked_by_that_verb() {
        let with = |field: &str| {
            let text = format!(r#"{{"cniVersion":"1.1.0",{field}}}"#);
            Config::parse(text.as_bytes()).unwrap()
        };
        for (field, word) in [(r#""mtu":10"#, "mtu of"), (r#""mtu":"x""#, "mtu of")] {
            let failure = with(field).mtu().unwrap_err();
            assert!(failure.to_string().contains(word), "{failure}");
        }
        for field in [r#""name":"""#, r#""name":"a b""#, r#""name":7"#, r#""x":1"#] {
            let failure = with(field).network().unwrap_err();
            assert_eq!(failure.code(), Code::InvalidConfiguration);
            assert!(failure.to_string().starts_with("name of"), "{failure}");
        }
    }

    #[test]
    fn what_gc_leaves_alone() {
        let valid = |field: &str| {
            let text = format!(r#"{{"cniVersion":"1.1.0",{field}}}"#);
            Config::parse(text.as_bytes()).unwrap().valid_attachments()
        };
        let one = r#"[{"containerID":"a","ifname":"eth0"}]"#;
        for name in VALID_ATTACHMENTS {
            assert_eq!(valid(&format!(r#""{name}":{one}"#)).unwrap().len(), 1);
            assert!(valid(&format!(r#""{name}":null"#)).unwrap().is_empty());
            for (list, words) in [
                (r#"[{"containerID":"a"}]"#, "[0]"),
                (
                    r#"[{"containerID":"a","ifname":"eth0"},{"containerID":"..","ifname":"x"}]"#,
                    "[1].containerID",
                ),
                (r#"[{"containerID":"a","ifname":"a/b"}]"#, "[0].ifname"),
                ("{}", name),
            ] {
                let failure = valid(&format!(r#""{name}":{list}"#)).unwrap_err();
                assert!(failure.to_string().contains(words), "{failure}");
            }
        }
        assert!(
            valid(r#""name":"n""#)
                .unwrap_err()
                .to_string()
                .contains("valid-attachments")
        );
    }

    #[test]
    fn input_is_bounded() {
        assert!(read_input(&b"{}"[..]).is_ok());
        let failure = read_input(std::io::repeat(b' ')).unwrap_err();
        assert_eq!(failure.code(), Code::Decode);
    }
}
