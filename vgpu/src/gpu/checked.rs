// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages that a step of single words has touched, each once, so that the CPU's tables are looked at once before and once
//! after for a page and not for every word.

use vgpu_spec::pte::PAGE_SHIFT;

/// Places in the cache that recognises pages.
const PLACES: usize = 64;
/// Pages remembered in a step: as many as it has words.
const MOST: usize = 256;

/// Owned by an engine.
pub(crate) struct Checked {
    step: u64,
    /// (page number, step).
    recent: [(u64, u64); PLACES],
    /// (address, leaf).
    pages: [(u64, u64); MOST],
    len: usize,
}

impl Default for Checked {
    fn default() -> Self {
        Self { step: 0, recent: [(0, 0); PLACES], pages: [(0, 0); MOST], len: 0 }
    }
}

impl Checked {
    /// A step begins.
    #[inline]
    pub(crate) fn begin(&mut self) {
        self.step += 1;
        self.len = 0;
    }

    /// Whether the page of `va` is new in this step; it is remembered. Now and then a page is found new again.
    #[inline]
    pub(crate) fn is_new(&mut self, va: u64, leaf: u64) -> bool {
        let page = va >> PAGE_SHIFT;
        let place = &mut self.recent[page as usize % PLACES];
        if *place == (page, self.step) || self.len == MOST {
            return false;
        }
        *place = (page, self.step);
        self.pages[self.len] = (va, leaf);
        self.len += 1;
        true
    }

    /// Address and leaf of each page of the step.
    #[inline]
    pub(crate) fn pages(&self) -> &[(u64, u64)] {
        &self.pages[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_new_once_a_step() {
        let mut checked = Checked::default();
        for _ in 0..2 {
            checked.begin();
            assert!(checked.is_new(0x1008, 7));
            assert!(!checked.is_new(0x1ff8, 7));
            assert!(checked.is_new(0, 8));
            assert_eq!(checked.pages(), [(0x1008, 7), (0, 8)]);
        }
    }
}
