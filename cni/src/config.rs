//! The network configuration on standard input.
//!
//! Only the fields that we use are looked at: a runtime adds others, and a
//! fault in one of those is no reason to leave a pod undeletable.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::failure::{Code, Failure};
use crate::version::SpecVersion;

/// Most bytes that are read from standard input.
const MAX_INPUT: u64 = 1024 * 1024;

/// Smallest MTU that IPv4 allows (RFC 791), largest of a veth.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

/// Smallest MTU that IPv6 allows (RFC 8200).
pub(crate) const MIN_MTU_IPV6: u32 = 1280;

/// A checked network configuration.
#[derive(Debug)]
pub(crate) struct Config {
    /// Format of the result.
    pub(crate) version: SpecVersion,
    /// Where the agent listens.
    pub(crate) agent_socket: PathBuf,
    /// Where releases wait for the agent.
    pub(crate) state_dir: PathBuf,
    /// MTU to use instead of the agent's.
    pub(crate) mtu: Option<u32>,
    /// Result of the plugin before us, or of ADD to CHECK and DEL.
    pub(crate) previous: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    agent_socket: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    mtu: Option<u32>,
    prev_result: Option<Value>,
}

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
        let version = SpecVersion::parse(object.get("cniVersion").and_then(Value::as_str))?;
        let wire: Wire = serde_json::from_value(object).map_err(|error| {
            Failure::new(
                Code::InvalidConfiguration,
                format!("the network configuration is not understood: {error}"),
            )
        })?;
        if let Some(mtu) = wire.mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
            return Err(Failure::new(
                Code::InvalidConfiguration,
                format!("mtu of the network configuration is {mtu}: it must be 68 to 65535"),
            ));
        }
        Ok(Self {
            version,
            agent_socket: absolute(
                "agentSocket",
                wire.agent_socket,
                ferrule_api::DEFAULT_SOCKET,
            )?,
            state_dir: absolute("stateDir", wire.state_dir, ferrule_api::DEFAULT_STATE_DIR)?,
            mtu: wire.mtu,
            previous: wire.prev_result,
        })
    }

    /// The version in an input that [`Config::parse`] may have refused.
    pub(crate) fn version_of(input: &[u8]) -> SpecVersion {
        serde_json::from_slice::<Value>(input)
            .ok()
            .and_then(|input| SpecVersion::parse(input.get("cniVersion")?.as_str()).ok())
            .unwrap_or(SpecVersion::NEWEST)
    }
}

/// A path that does not depend on the folder in which the runtime starts us.
fn absolute(field: &str, given: Option<PathBuf>, default: &str) -> Result<PathBuf, Failure> {
    let path = given.unwrap_or_else(|| Path::new(default).to_owned());
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Failure::new(
        Code::InvalidConfiguration,
        format!(
            "{field} of the network configuration is {:?}: it must be an absolute path",
            path.to_string_lossy()
        ),
    ))
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
        assert_eq!(config.mtu, None);
    }

    #[test]
    fn wrong_fields_are_named() {
        for (input, code, word) in [
            ("", Code::Decode, "JSON"),
            ("[]", Code::IncompatibleVersion, "missing"),
            ("{}", Code::IncompatibleVersion, "missing"),
            (r#"{"cniVersion":"9"}"#, Code::IncompatibleVersion, "\"9\""),
            (
                r#"{"cniVersion":"1.0.0","mtu":10}"#,
                Code::InvalidConfiguration,
                "mtu",
            ),
            (
                r#"{"cniVersion":"1.0.0","mtu":"x"}"#,
                Code::InvalidConfiguration,
                "x",
            ),
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
    fn input_is_bounded() {
        assert!(read_input(&b"{}"[..]).is_ok());
        let failure = read_input(std::io::repeat(b' ')).unwrap_err();
        assert_eq!(failure.code(), Code::Decode);
    }
}
