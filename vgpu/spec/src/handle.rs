// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handles: what a driver calls a context, queue, VRAM page or fault by.
//!
//! A handle is 64 bits: bits 0-23 the index, bits 24-31 the kind, bits 32-63 the generation. The generation begins at 1 and
//! goes up each time the index is given out, so a stale handle is seen as one. Zero is no handle.

/// What a handle names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A context: one mirrored address space.
    Context = 1,
    /// A queue of jobs.
    Queue = 2,
    /// A page of a context's page tables.
    TablePage = 3,
    /// A data page of VRAM.
    DataPage = 4,
    /// A replayable fault.
    Fault = 5,
}

impl Kind {
    /// The kind of a handle's kind byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Context,
            2 => Self::Queue,
            3 => Self::TablePage,
            4 => Self::DataPage,
            5 => Self::Fault,
            _ => return None,
        })
    }
}

/// A handle as it stands in commands, jobs and fault entries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Handle(pub u64);

impl Handle {
    /// No handle.
    pub const NONE: Self = Self(0);
    /// Largest index.
    pub const MAX_INDEX: u32 = 0xff_ffff;

    /// Makes a handle; `index` is cut to 24 bits.
    #[must_use]
    pub fn new(kind: Kind, index: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | (kind as u64) << 24 | u64::from(index & Self::MAX_INDEX))
    }
    /// The index, 0 to [`Self::MAX_INDEX`].
    #[must_use]
    pub fn index(self) -> u32 {
        (self.0 & u64::from(Self::MAX_INDEX)) as u32
    }
    /// The generation; 0 in no valid handle.
    #[must_use]
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// The kind, if its byte is one.
    #[must_use]
    pub fn kind(self) -> Option<Kind> {
        Kind::from_byte((self.0 >> 24) as u8)
    }
}

impl core::fmt::Debug for Handle {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.kind() {
            Some(kind) => write!(f, "{kind:?} {}#{}", self.index(), self.generation()),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

impl core::fmt::Display for Handle {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.kind() {
            Some(Kind::Context) => write!(f, "context {}#{}", self.index(), self.generation()),
            Some(Kind::Queue) => write!(f, "queue {}#{}", self.index(), self.generation()),
            Some(Kind::TablePage) => write!(f, "table page {}#{}", self.index(), self.generation()),
            Some(Kind::DataPage) => write!(f, "data page {}#{}", self.index(), self.generation()),
            Some(Kind::Fault) => write!(f, "fault {}#{}", self.index(), self.generation()),
            None => write!(f, "handle {:#x}", self.0),
        }
    }
}
