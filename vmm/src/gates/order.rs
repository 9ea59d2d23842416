// SPDX-License-Identifier: MIT OR Apache-2.0
//! Orders of gates: chosen by a seed, or one that was written down, to be had again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vgpu::gates::Role;

use super::script::Script;

/// Longest list that is taken or written down.
pub const MAX_TURNS: usize = 512;

/// Who goes on next, without a script.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// One of those that wait, by chance.
    Seed(u64),
    /// Whoever is next here.
    List(Vec<Turn>),
}

/// A task that goes on: from which gate, and which role it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// The gate's name.
    pub gate: String,
    /// The role; empty: a task that has none.
    pub role: String,
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.gate)?;
        if self.role.is_empty() { Ok(()) } else { write!(f, "@{}", self.role) }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seed(seed) => write!(f, "{seed}"),
            Self::List(turns) => f.write_str(&list(turns)),
        }
    }
}

/// Turns as they are given on the command line.
#[must_use]
pub fn list(turns: &[Turn]) -> String {
    turns.iter().map(Turn::to_string).collect::<Vec<_>>().join(",")
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            let seed = match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => text.parse(),
            };
            return seed.map(Self::Seed).map_err(|_| "a seed is a whole number of 64 bits".to_owned());
        }
        let turn = |word: &str| {
            let (gate, role) = word.split_once('@').unwrap_or((word, ""));
            if gate.is_empty() || Role::new(role).is_none() {
                return Err(format!("{word:?} is no turn: GATE or GATE@ROLE"));
            }
            Ok(Turn { gate: gate.to_owned(), role: role.to_owned() })
        };
        let turns: Vec<Turn> = text.split(',').map(turn).collect::<Result<_, _>>()?;
        if turns.len() > MAX_TURNS {
            return Err(format!("more than {MAX_TURNS} turns"));
        }
        Ok(Self::List(turns))
    }
}

impl Order {
    /// Whether a scenario has the gates that this names.
    ///
    /// # Errors
    /// The first that it does not have, in words.
    pub fn check(&self, script: &Script) -> Result<(), String> {
        let Self::List(turns) = self else { return Ok(()) };
        let closable = |name: &str| script.sites.iter().any(|site| site.name == name && !site.record);
        match turns.iter().find(|turn| !closable(&turn.gate)) {
            None => Ok(()),
            Some(turn) => Err(format!("the scenario has no gate {:?} where somebody waits", turn.gate)),
        }
    }
}

/// A generator of chance (splitmix64); the same seed and repetition choose the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64, repetition: u64) -> Self {
        Self(seed ^ repetition.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z % bound.max(1) as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_back() {
        assert_eq!("7".parse(), Ok(Order::Seed(7)));
        assert_eq!("0x10".parse(), Ok(Order::Seed(16)));
        let order: Order = "found@fault,drop,found@fault".parse().unwrap();
        assert_eq!(order.to_string(), "found@fault,drop,found@fault");
        for bad in ["", "7x", "a,,b", "@x", "a@a-role-that-is-too-long"] {
            assert!(bad.parse::<Order>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chance_depends_on_both() {
        let draw = |seed, repetition| {
            let mut chance = Chance::new(seed, repetition);
            (0..16).map(|_| chance.below(5)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
    }
}
