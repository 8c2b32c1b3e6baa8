//! How fields of the API are read.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

/// The API treats `null` like a field that is not there; serde's `default` does not.
pub(super) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A port, with an error that says what one looks like; `null` is 0, the API's "none".
pub(super) fn port_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    optional_port(deserializer).map(Option::unwrap_or_default)
}

/// Likewise, where 0 and `null` differ.
pub(super) fn optional_port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u16>, D::Error> {
    deserializer.deserialize_option(PortNumber)
}

struct PortNumber;

impl PortNumber {
    fn check<N, E>(number: N) -> Result<Option<u16>, E>
    where
        N: Copy + fmt::Display,
        u16: TryFrom<N>,
        E: de::Error,
    {
        u16::try_from(number).map(Some).map_err(|_| {
            E::custom(format!(
                "{number} is not a port number; give one from 1 to 65535"
            ))
        })
    }
}

impl<'de> Visitor<'de> for PortNumber {
    type Value = Option<u16>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number from 1 to 65535, without quotes")
    }

    fn visit_none<E>(self) -> Result<Option<u16>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<u16>, D::Error> {
        deserializer.deserialize_i64(self)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Option<u16>, E> {
        Self::check(number)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Option<u16>, E> {
        Self::check(number)
    }
}

/// Texts by key. A value that is `null` is empty, as the API server reads it: charts
/// write `label:` with nothing behind it.
pub(super) fn texts<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts: BTreeMap<String, Option<String>> = null_is_default(deserializer)?;
    let texts = texts.into_iter();
    Ok(texts
        .map(|(key, text)| (key, text.unwrap_or_default()))
        .collect())
}
