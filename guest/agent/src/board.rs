// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page shared between a workload and its parent: how many cases ran, and which runs now, should it die in it.

use nix::errno::Errno;

use crate::memory::{Backing, Mapping, PAGE};

const CASES: usize = 0;
const FAILED: usize = 8;
const LENGTH: usize = 16;
const NAME: usize = 24;
const LONGEST: usize = 256;

/// The page.
#[derive(Debug)]
pub(crate) struct Board(Mapping);

impl Board {
    /// An empty one.
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self(Mapping::new(PAGE, PAGE, Backing::AnonymousShared)?))
    }

    /// A case begins.
    pub(crate) fn begin(&self, name: &str) {
        let name = &name.as_bytes()[..name.len().min(LONGEST)];
        for (index, chunk) in name.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0.store(NAME + 8 * index, u64::from_ne_bytes(word));
        }
        self.0.store(LENGTH, name.len() as u64);
    }

    /// A case ended.
    pub(crate) fn end(&self, failed: bool) {
        self.0.store(LENGTH, 0);
        self.0.add(CASES, 1);
        self.0.add(FAILED, u64::from(failed));
    }

    /// Cases that ended.
    pub(crate) fn cases(&self) -> u64 {
        self.0.load(CASES)
    }

    /// Cases that failed.
    pub(crate) fn failed(&self) -> u64 {
        self.0.load(FAILED)
    }

    /// The case that runs now.
    pub(crate) fn running(&self) -> Option<String> {
        let length = (self.0.load(LENGTH) as usize).min(LONGEST);
        let bytes: Vec<u8> =
            (0..length).step_by(8).flat_map(|at| self.0.load(NAME + at).to_ne_bytes()).take(length).collect();
        (length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_running_case() {
        let board = Board::new().unwrap();
        assert_eq!(board.running(), None);
        board.begin("munmap/running/thp");
        assert_eq!(board.running().as_deref(), Some("munmap/running/thp"));
        board.end(true);
        assert_eq!((board.cases(), board.failed(), board.running()), (1, 1, None));
    }
}
