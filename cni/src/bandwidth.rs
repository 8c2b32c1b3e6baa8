//! The capability `bandwidth`: how fast a pod may receive and send, as the
//! runtime or the network configuration asks for it.
//!
//! The fields and their rules are those of the reference plugin `bandwidth`:
//! four whole numbers in bits, either beside `type` or in
//! `runtimeConfig.bandwidth`, the former before the latter. They are taken
//! apart by ADD and CHECK only: a fault in one must not keep DEL from its work.
//! What the kernel is told about them stands in [`crate::tc`].

use serde_json::Value;

use crate::failure::{Code, Failure};

/// The least rate, in bits: tbf counts in bytes a second.
const MIN_RATE: u64 = 8;

/// Bursts from here on, in bits, are what runtimes send when nobody has asked
/// for one: the kubelet 2³¹ - 1, containerd 2³² - 1, CRI-O 2³⁵ - 9. Taken by
/// their word, a pod's first half gigabyte would not be shaped at all.
const NO_BURST_ASKED: u64 = 0x7fff_ffff;

/// What a burst is where nobody has asked for one: this part of a second ...
const BURST_PER_SECOND: u64 = 20;

/// ... but no less than two of the largest segments that the kernel passes
/// around in one piece; cutting them up takes time. In bytes.
const MIN_OWN_BURST: u64 = 128 * 1024;

/// Bytes of an Ethernet header: tbf weighs packets with it.
const ETHERNET_HEADER: u32 = 14;

/// The fields of one direction, with its direction for people.
const TO_POD: Fields = Fields {
    rate: "ingressRate",
    burst: "ingressBurst",
};
const FROM_POD: Fields = Fields {
    rate: "egressRate",
    burst: "egressBurst",
};

/// Fields of the reference plugin that we do not have.
const SUBNETS: [&str; 2] = ["unshapedSubnets", "shapedSubnets"];

struct Fields {
    rate: &'static str,
    burst: &'static str,
}

/// A limit that was asked for and cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BandwidthError {
    #[error("{place} of the network configuration is {value}: it must be an object")]
    NoObject { place: &'static str, value: String },
    #[error("{field} of the network configuration is {value}: it must be a whole number of {unit}")]
    NoNumber {
        field: String,
        value: String,
        unit: &'static str,
    },
    #[error(
        "{field} of the network configuration is {value}: it must be at most {} {unit}",
        u64::MAX
    )]
    TooLarge {
        field: String,
        value: String,
        unit: &'static str,
    },
    #[error(
        "{field} of the network configuration is {rate}: it must be at least {MIN_RATE} bits a second, or 0 for no limit"
    )]
    TooSlow { field: String, rate: u64 },
    #[error(
        "{field} of the network configuration is missing: a rate needs a burst, in bits; a tenth of {rate} will do"
    )]
    NoBurst { field: String, rate: String },
    #[error(
        "{burst} of the network configuration is set and {field} is not: a burst needs a rate, in bits a second; set both or neither"
    )]
    NoRate { field: String, burst: String },
    #[error(
        "{field} of the network configuration is {burst} bits: no packet of {mtu} bytes would pass, it must be at least {} bits", least_burst(*mtu)
    )]
    BurstBelowPacket { field: String, burst: u64, mtu: u32 },
    #[error(
        "{field} of the network configuration is not supported: all traffic of a pod is shaped; remove it"
    )]
    Subnets { field: String },
}

impl From<BandwidthError> for Failure {
    fn from(error: BandwidthError) -> Self {
        Self::new(Code::InvalidConfiguration, error.to_string())
    }
}

/// The least burst that lets a packet of full size pass, in bits.
fn least_burst(mtu: u32) -> u64 {
    u64::from(mtu.saturating_add(ETHERNET_HEADER)) * 8
}

/// What one direction is limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    /// Bytes a second.
    pub(crate) rate: u64,
    /// Bytes that may pass at once after a pause.
    pub(crate) burst: u32,
}

/// What a pod is limited to; none where nobody asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bandwidth {
    /// Ingress, as the pod sees it.
    pub(crate) to_pod: Option<Limit>,
    /// Egress.
    pub(crate) from_pod: Option<Limit>,
}

/// The part of a network configuration that may ask for limits, unread.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Asked {
    place: &'static str,
    value: Value,
}

impl Asked {
    /// Finds the part in a network configuration. That of the runtime counts
    /// only where the configuration itself has none of the fields.
    pub(crate) fn of(config: &Value) -> Self {
        let fields = [&TO_POD, &FROM_POD].map(|fields| [fields.rate, fields.burst]);
        let mut all = fields.iter().flatten().chain(&SUBNETS);
        if all.any(|field| config.get(field).is_some_and(|value| !value.is_null())) {
            return Self {
                place: "",
                value: config.clone(),
            };
        }
        let value = config.pointer("/runtimeConfig/bandwidth");
        Self {
            place: "runtimeConfig.bandwidth",
            value: value.cloned().unwrap_or_default(),
        }
    }

    /// The limits for an interface of this MTU.
    ///
    /// # Errors
    /// [`BandwidthError`] about the first field that is wrong.
    pub(crate) fn limits(&self, mtu: u32) -> Result<Bandwidth, BandwidthError> {
        if self.value.is_null() {
            return Ok(Bandwidth::default());
        }
        if !self.value.is_object() {
            return Err(BandwidthError::NoObject {
                place: self.place,
                value: self.value.to_string(),
            });
        }
        let listed = |field: &&str| match self.value.get(*field) {
            Some(Value::Array(subnets)) => !subnets.is_empty(),
            Some(other) => !other.is_null(),
            None => false,
        };
        if let Some(field) = SUBNETS.iter().find(|field| listed(field)) {
            let field = self.path(field);
            return Err(BandwidthError::Subnets { field });
        }
        Ok(Bandwidth {
            to_pod: self.limit(&TO_POD, mtu)?,
            from_pod: self.limit(&FROM_POD, mtu)?,
        })
    }

    fn limit(&self, fields: &Fields, mtu: u32) -> Result<Option<Limit>, BandwidthError> {
        let rate = self.number(fields.rate, "bits a second")?;
        let burst = self.number(fields.burst, "bits")?;
        let path = |field| self.path(field);
        match (rate, burst) {
            (0, 0) => Ok(None),
            (0, _) => Err(BandwidthError::NoRate {
                field: path(fields.rate),
                burst: path(fields.burst),
            }),
            (1..MIN_RATE, _) => Err(BandwidthError::TooSlow {
                field: path(fields.rate),
                rate,
            }),
            (_, 0) => Err(BandwidthError::NoBurst {
                field: path(fields.burst),
                rate: path(fields.rate),
            }),
            (_, NO_BURST_ASKED..) => Ok(Some(Limit::with_own_burst(rate / 8))),
            _ if burst < least_burst(mtu) => Err(BandwidthError::BurstBelowPacket {
                field: path(fields.burst),
                burst,
                mtu,
            }),
            _ => Ok(Some(Limit {
                rate: rate / 8,
                burst: u32::try_from(burst / 8).unwrap_or(u32::MAX),
            })),
        }
    }

    /// A field's number; 0 where there is none.
    fn number(&self, field: &str, unit: &'static str) -> Result<u64, BandwidthError> {
        let value = match self.value.get(field) {
            None | Some(Value::Null) => return Ok(0),
            Some(value) => value,
        };
        let field = || self.path(field);
        if let Some(number) = value.as_u64() {
            return Ok(number);
        }
        // What does not fit 64 bits is read as a floating-point number.
        let value_text = value.to_string();
        if value.as_f64().is_some_and(|number| number >= 1.8e19) {
            return Err(BandwidthError::TooLarge {
                field: field(),
                value: value_text,
                unit,
            });
        }
        Err(BandwidthError::NoNumber {
            field: field(),
            value: value_text,
            unit,
        })
    }

    fn path(&self, field: &str) -> String {
        if self.place.is_empty() {
            return field.to_owned();
        }
        format!("{}.{field}", self.place)
    }
}

impl Limit {
    fn with_own_burst(rate: u64) -> Self {
        let burst = (rate / BURST_PER_SECOND).max(MIN_OWN_BURST);
        Self {
            rate,
            burst: u32::try_from(burst).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MTU: u32 = 1500;

    fn from_runtime(bandwidth: &Value) -> Result<Bandwidth, BandwidthError> {
        Asked::of(&json!({"runtimeConfig": {"bandwidth": bandwidth}})).limits(MTU)
    }

    #[test]
    fn nothing_asked_is_no_limit() {
        for config in [
            json!({}),
            json!([]),
            json!({"runtimeConfig": {}}),
            json!({"runtimeConfig": "odd"}),
            json!({"runtimeConfig": {"bandwidth": null}}),
            json!({"runtimeConfig": {"bandwidth": {}}}),
            json!({"runtimeConfig": {"bandwidth": {"ingressRate": 0, "ingressBurst": 0,
                "egressRate": null, "shapedSubnets": [], "unshapedSubnets": null}}}),
            json!({"ingressRate": 0}),
        ] {
            let limits = Asked::of(&config).limits(MTU);
            assert_eq!(limits, Ok(Bandwidth::default()), "{config}");
        }
    }

    #[test]
    fn each_direction_in_bytes() {
        let asked = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000});
        assert_eq!(
            from_runtime(&asked),
            Ok(Bandwidth {
                to_pod: Some(Limit {
                    rate: 1_000_000,
                    burst: 100_000
                }),
                from_pod: None
            })
        );
        let asked = json!({"egressRate": 8, "egressBurst": (1500 + 14) * 8});
        assert_eq!(
            from_runtime(&asked),
            Ok(Bandwidth {
                to_pod: None,
                from_pod: Some(Limit {
                    rate: 1,
                    burst: 1514
                })
            })
        );
    }

    #[test]
    fn the_configuration_goes_before_the_runtime() {
        let mut config = json!({"egressRate": 8_000, "egressBurst": 80_000, "runtimeConfig":
            {"bandwidth": {"egressRate": 16_000, "egressBurst": 80_000,
                "ingressRate": 16_000, "ingressBurst": 80_000}}});
        let limits = Asked::of(&config).limits(MTU).unwrap();
        assert_eq!(limits.from_pod.unwrap().rate, 1_000);
        assert_eq!(limits.to_pod, None);
        config["egressRate"] = json!(null);
        config["egressBurst"] = json!(null);
        let limits = Asked::of(&config).limits(MTU).unwrap();
        assert_eq!(limits.from_pod.unwrap().rate, 2_000);
        assert_eq!(limits.to_pod.unwrap().rate, 2_000);
    }

    #[test]
    fn a_runtime_without_an_opinion_gets_a_burst_of_ours() {
        for burst in [
            0x7fff_ffff_u64,
            0xffff_ffff,
            0xffff_ffff * 8 - 1,
            u64::MAX / 2,
        ] {
            let with = |rate: u64| {
                let asked = json!({"ingressRate": rate, "ingressBurst": burst});
                from_runtime(&asked).unwrap().to_pod.unwrap()
            };
            // What `kubernetes.io/ingress-bandwidth: 10M` and `1P` become.
            assert_eq!(with(10_000_000).burst, 128 * 1024);
            assert_eq!(with(1_000_000_000).burst, 6_250_000);
            assert_eq!(with(1_000_000_000_000_000).burst, u32::MAX);
            assert_eq!(with(u64::MAX).rate, u64::MAX / 8);
        }
        let asked = json!({"ingressRate": 80, "ingressBurst": 0x7fff_fffe});
        let limit = from_runtime(&asked).unwrap().to_pod.unwrap();
        assert_eq!(limit.burst, 0x7fff_fffe / 8);
    }

    #[test]
    fn what_cannot_be_is_said_with_field_and_remedy() {
        for (asked, words) in [
            (
                json!("10M"),
                "runtimeConfig.bandwidth of the network configuration is \"10M\": it must be an object",
            ),
            (
                json!({"ingressRate": -5, "ingressBurst": 80_000}),
                "runtimeConfig.bandwidth.ingressRate of the network configuration is -5: it must be a whole number of bits a second",
            ),
            (
                json!({"egressRate": "10M", "egressBurst": 80_000}),
                "runtimeConfig.bandwidth.egressRate of the network configuration is \"10M\": it must be a whole number of bits a second",
            ),
            (
                json!({"egressRate": 8e3, "egressBurst": 1.5}),
                "egressRate of the network configuration is 8000.0: it must be a whole",
            ),
            (
                json!({"egressRate": 8000, "egressBurst": true}),
                "egressBurst of the network configuration is true: it must be a whole number of bits",
            ),
            (
                json!({"egressRate": 7, "egressBurst": 80_000}),
                "egressRate of the network configuration is 7: it must be at least 8 bits a second",
            ),
            (
                json!({"ingressRate": 8000}),
                "runtimeConfig.bandwidth.ingressBurst of the network configuration is missing: a rate needs a burst",
            ),
            (
                json!({"ingressBurst": 80_000}),
                "runtimeConfig.bandwidth.ingressBurst of the network configuration is set and runtimeConfig.bandwidth.ingressRate is not",
            ),
            (
                json!({"ingressRate": 8000, "ingressBurst": 12_111}),
                "ingressBurst of the network configuration is 12111 bits: no packet of 1500 bytes would pass, it must be at least 12112 bits",
            ),
            (
                json!({"ingressRate": 8000, "ingressBurst": 80_000, "unshapedSubnets": ["10.0.0.0/8"]}),
                "runtimeConfig.bandwidth.unshapedSubnets of the network configuration is not supported",
            ),
        ] {
            let error = from_runtime(&asked).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(Failure::from(error).code(), Code::InvalidConfiguration);
        }
        let text = r#"{"ingressRate": 18446744073709551616, "ingressBurst": 80000}"#;
        let config = serde_json::from_str(text).unwrap();
        let error = Asked::of(&config).limits(MTU).unwrap_err();
        let words = "it must be at most 18446744073709551615 bits a second";
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().starts_with("ingressRate of"), "{error}");
    }
}
