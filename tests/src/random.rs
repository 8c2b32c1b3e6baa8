//! Numbers that look random and come again from the same seed.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;

/// `SplitMix64` (Steele, Lea, Flood 2014): one word of state, any seed is good.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The row of numbers that belongs to a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number less than `bound`; 0 where there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.number() % bound).unwrap_or_default()
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of several, of which there must be one.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend(self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// The seed that an environment variable has, so that a run can be repeated, or a fresh one.
///
/// # Errors
/// When the variable holds no number.
pub fn seed(variable: &str) -> anyhow::Result<u64> {
    if let Some(seed) = from_environment(variable)? {
        return Ok(seed);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let fresh = u64::from(now.subsec_nanos()) ^ now.as_secs().rotate_left(32);
    // Short enough to be typed.
    Ok(Random::new(fresh).number() % 1_000_000_000)
}

/// A number in an environment variable, if it is set to something.
///
/// # Errors
/// When it holds something else.
pub fn from_environment(variable: &str) -> anyhow::Result<Option<u64>> {
    match std::env::var(variable) {
        Ok(text) if !text.is_empty() => text
            .parse()
            .map(Some)
            .with_context(|| format!("{variable}={text:?} is no number")),
        Ok(_) | Err(_) => Ok(None),
    }
}
