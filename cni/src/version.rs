//! Versions of the CNI specification, and the verb VERSION.

use std::fmt;

use serde_json::{Value, json};

use crate::failure::{Code, Failure};

/// A version of the specification whose results we can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SpecVersion {
    /// First with `interfaces` in results.
    V0_3_1,
    /// Adds CHECK.
    V0_4_0,
    /// Takes `ips[].version` away.
    V1_0_0,
    /// Adds STATUS, GC and `interfaces[].mtu`.
    V1_1_0,
}

impl SpecVersion {
    /// What VERSION reports, and a configuration may say.
    const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The version in errors about calls whose own version is unknown.
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version that a configuration names.
    pub(crate) fn parse(given: Option<&Value>) -> Result<Self, Failure> {
        let known = |text| {
            Self::ALL
                .into_iter()
                .find(|version| version.as_str() == text)
        };
        given
            .and_then(Value::as_str)
            .and_then(known)
            .ok_or_else(|| {
                let given = given.map_or("is missing, which means 0.1.0".to_owned(), |value| {
                    format!(
                        "is {}",
                        value.to_string().chars().take(32).collect::<String>()
                    )
                });
                Failure::new(
                    Code::IncompatibleVersion,
                    format!(
                        "cniVersion of the network configuration {given}: set it to one of {}",
                        Self::ALL.map(Self::as_str).join(", ")
                    ),
                )
            })
    }

    /// Fails unless the version has `verb`, which came with `since`.
    pub(crate) fn require(self, since: Self, verb: &str) -> Result<(), Failure> {
        if self >= since {
            return Ok(());
        }
        Err(Failure::new(
            Code::IncompatibleVersion,
            format!("cniVersion {self} has no {verb}: it came with {since}"),
        ))
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The reply to VERSION. `input` is standard input, which old runtimes leave
/// empty; what cannot be read there is no reason to fail.
pub(crate) fn reply(input: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(input)
        .ok()
        .and_then(|input| Some(input.get("cniVersion")?.as_str()?.to_owned()))
        .filter(|version| version.len() <= 32)
        .unwrap_or_else(|| SpecVersion::NEWEST.to_string());
    json!({
        "cniVersion": asked,
        "supportedVersions": SpecVersion::ALL.map(SpecVersion::as_str),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_is_reported() {
        let reply = reply(br#"{"cniVersion":"0.4.0"}"#);
        assert_eq!(reply["cniVersion"], "0.4.0");
        assert_eq!(
            reply["supportedVersions"],
            json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
        );
        for input in [&b""[..], b"\xff", b"[]", b"{\"cniVersion\":1}"] {
            assert_eq!(super::reply(input)["cniVersion"], "1.1.0");
        }
    }

    #[test]
    fn versions_we_cannot_write_are_refused() {
        let parse = |value: &Value| SpecVersion::parse(Some(value));
        assert_eq!(parse(&json!("1.1.0")), Ok(SpecVersion::V1_1_0));
        let missing = SpecVersion::parse(None).unwrap_err().to_string();
        assert!(missing.contains("is missing"), "{missing}");
        for (bad, words) in [
            (json!(""), "is \"\""),
            (json!("0.2.0"), "is \"0.2.0\""),
            (json!("1.0"), "is \"1.0\""),
            (json!(1), "is 1:"),
            (json!(null), "is null:"),
        ] {
            let failure = parse(&bad).unwrap_err();
            assert_eq!(failure.code(), Code::IncompatibleVersion);
            let said = failure.to_string();
            assert!(said.contains("0.3.1") && said.contains(words), "{said}");
        }
        assert!(
            SpecVersion::V0_3_1
                .require(SpecVersion::V0_4_0, "CHECK")
                .is_err()
        );
    }
}
