// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page shared between a workload, its lanes and PID 1: how many cases ran, and which run now, should a process die in one.

use std::sync::Arc;

use nix::errno::Errno;

use crate::memory::{Backing, Mapping, PAGE};

const CASES: usize = 0;
const FAILED: usize = 8;
const ROUNDS: usize = 16;
/// Where the lanes begin, each with the length of its running case's name and the name.
const LANE: usize = 64;
const LANE_BYTES: usize = 8 + LONGEST;
const LONGEST: usize = 256;
/// Lanes that the page has room for.
pub(crate) const LANES: usize = 8;

/// The page, as one lane of a workload writes it.
#[derive(Clone, Debug)]
pub(crate) struct Board {
    page: Arc<Mapping>,
    lane: usize,
}

impl Board {
    /// An empty one; its first lane.
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { page: Arc::new(Mapping::new(PAGE, PAGE, Backing::AnonymousShared)?), lane: 0 })
    }

    /// The same page for another lane, below [`LANES`].
    pub(crate) fn lane(&self, lane: usize) -> Self {
        assert!(lane < LANES, "lane {lane}");
        Self { page: Arc::clone(&self.page), lane }
    }

    fn place(lane: usize) -> usize {
        LANE + lane * LANE_BYTES
    }

    /// A case begins in this lane.
    pub(crate) fn begin(&self, name: &str) {
        let name = &name.as_bytes()[..name.len().min(LONGEST)];
        let place = Self::place(self.lane);
        for (index, chunk) in name.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.page.store(place + 8 + 8 * index, u64::from_ne_bytes(word));
        }
        self.page.store(place, name.len() as u64);
    }

    /// A case of this lane ended.
    pub(crate) fn end(&self, failed: bool) {
        self.page.store(Self::place(self.lane), 0);
        self.page.add(CASES, 1);
        self.page.add(FAILED, u64::from(failed));
    }

    /// A round ended; how many that makes, over all lanes.
    pub(crate) fn end_round(&self) -> u64 {
        self.page.add(ROUNDS, 1) + 1
    }

    /// Cases that ended, over all lanes.
    pub(crate) fn cases(&self) -> u64 {
        self.page.load(CASES)
    }

    /// Cases that failed, over all lanes.
    pub(crate) fn failed(&self) -> u64 {
        self.page.load(FAILED)
    }

    /// The case that this lane runs now.
    pub(crate) fn running(&self) -> Option<String> {
        let place = Self::place(self.lane);
        let length = (self.page.load(place) as usize).min(LONGEST);
        let bytes: Vec<u8> = (0..length)
            .step_by(8)
            .flat_map(|at| self.page.load(place + 8 + at).to_ne_bytes())
            .take(length)
            .collect();
        (length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_running_case_of_each_lane() {
        let board = Board::new().unwrap();
        let last = board.lane(LANES - 1);
        assert_eq!(board.running(), None);
        last.begin(&"x".repeat(2 * LONGEST));
        board.begin("munmap/running/thp");
        assert_eq!(board.running().as_deref(), Some("munmap/running/thp"));
        assert_eq!(last.running().map(|name| name.len()), Some(LONGEST));
        board.end(true);
        assert_eq!((board.cases(), board.failed(), board.running()), (1, 1, None));
        last.end(false);
        assert_eq!((last.cases(), last.failed(), last.running()), (2, 1, None));
        assert_eq!((board.end_round(), last.end_round()), (1, 2));
    }
}
