// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who owns which page of VRAM.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use vgpu_spec::handle::{Handle, Kind};

/// Why a page was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GrantError {
    /// There is no such page.
    Range,
    /// Somebody has it.
    Owned,
    /// Its generations are used up.
    WornOut,
}

#[derive(Debug, Default)]
struct Page {
    /// Handle of the context that has it, or 0.
    owner: AtomicU64,
    generation: AtomicU32,
}

/// The pages of one kind. Changed by the holder of the command core's lock only; read by anybody.
#[derive(Debug)]
pub(crate) struct Pages {
    kind: Kind,
    pages: Box<[Page]>,
}

impl Pages {
    pub(crate) fn new(kind: Kind, count: u32) -> Self {
        Self { kind, pages: (0..count).map(|_| Page::default()).collect() }
    }

    pub(crate) fn len(&self) -> u32 {
        self.pages.len() as u32
    }

    /// Checks that the page can be granted. [`Self::grant`] does it; in between the page can be cleared.
    pub(crate) fn grantable(&self, index: u64) -> Result<u32, GrantError> {
        let index = u32::try_from(index).map_err(|_| GrantError::Range)?;
        let page = self.pages.get(index as usize).ok_or(GrantError::Range)?;
        if page.owner.load(SeqCst) != 0 {
            return Err(GrantError::Owned);
        }
        if page.generation.load(SeqCst) == u32::MAX {
            return Err(GrantError::WornOut);
        }
        Ok(index)
    }

    pub(crate) fn grant(&self, index: u32, ctx: Handle) -> Handle {
        let page = &self.pages[index as usize];
        let generation = page.generation.load(SeqCst) + 1;
        page.generation.store(generation, SeqCst);
        page.owner.store(ctx.0, SeqCst);
        Handle::new(self.kind, index, generation)
    }

    pub(crate) fn take_back(&self, index: u32) {
        self.pages[index as usize].owner.store(0, SeqCst);
    }

    /// Whom the page belongs to, or no handle.
    #[inline]
    pub(crate) fn owner(&self, index: u32) -> Handle {
        Handle(self.pages.get(index as usize).map_or(0, |page| page.owner.load(SeqCst)))
    }

    /// The page's handle as it was last given out.
    pub(crate) fn handle(&self, index: u32) -> Handle {
        let generation = self.pages.get(index as usize).map_or(0, |page| page.generation.load(SeqCst));
        Handle::new(self.kind, index, generation)
    }

    /// The index, if the handle is live and the context's.
    pub(crate) fn check(&self, handle: Handle, ctx: Handle) -> Option<u32> {
        let index = handle.index();
        let live = handle.generation() != 0 && self.handle(index) == handle;
        (live && self.owner(index) == ctx).then_some(index)
    }

    /// Whether this handle was given out at some time and is not live now.
    pub(crate) fn issued_before(&self, handle: Handle) -> bool {
        let Some(page) = self.pages.get(handle.index() as usize) else { return false };
        let current = page.generation.load(SeqCst);
        let live = page.owner.load(SeqCst) != 0 && handle.generation() == current;
        handle.kind() == Some(self.kind) && (1..=current).contains(&handle.generation()) && !live
    }

    /// Every page that the context has.
    pub(crate) fn owned_by(&self, ctx: Handle) -> impl Iterator<Item = u32> + '_ {
        self.owned().filter(move |&index| self.owner(index) == ctx)
    }

    /// Every page that somebody has.
    pub(crate) fn owned(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len()).filter(|&index| self.owner(index) != Handle::NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_one_owner_and_stale_handles_are_seen() {
        let pages = Pages::new(Kind::DataPage, 4);
        let (a, b) = (Handle::new(Kind::Context, 0, 1), Handle::new(Kind::Context, 1, 1));
        assert_eq!(pages.grantable(4), Err(GrantError::Range));
        assert_eq!(pages.grantable(u64::MAX), Err(GrantError::Range));
        let first = pages.grant(pages.grantable(2).unwrap(), a);
        assert_eq!(pages.grantable(2), Err(GrantError::Owned));
        assert_eq!((pages.check(first, a), pages.check(first, b)), (Some(2), None));
        assert!(!pages.issued_before(first));
        pages.take_back(2);
        assert!(pages.issued_before(first));
        assert_eq!(pages.check(first, a), None);
        let second = pages.grant(2, b);
        assert_ne!(first, second);
        assert!(pages.issued_before(first) && !pages.issued_before(second));
        assert!(!pages.issued_before(Handle::new(Kind::TablePage, 2, 1)));
        assert!(!pages.issued_before(Handle::new(Kind::DataPage, 2, 3)));
        assert_eq!(pages.owned_by(b).collect::<Vec<_>>(), [2]);
    }
}
