// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the witness says of an invalidation (RANGE_START, RANGE_END): event and flags, the lower half of arg2.

crate::constants! {
    /// Event: addresses are unmapped. The numbers are the kernel's enum mmu_notifier_event.
    UNMAP: u32 = 0;
    /// Event: pages are replaced.
    CLEAR: u32 = 1;
    /// Event: rights of a mapping change.
    PROTECTION_VMA: u32 = 2;
    /// Event: pages are write-protected.
    PROTECTION_PAGE: u32 = 3;
    /// Event: soft-dirty bits are cleared.
    SOFT_DIRTY: u32 = 4;
    /// Event: the address space goes.
    RELEASE: u32 = 5;
    /// Event: a driver migrates pages.
    MIGRATE: u32 = 6;
    /// Event: a driver takes pages for its device's atomics.
    EXCLUSIVE: u32 = 7;
    /// Event: an event that this interface has no number for; taken for CLEAR.
    OTHER: u32 = 255;
    /// Flag: callbacks could sleep.
    BLOCKABLE: u32 = 1 << 8;
    /// Flag: the caller named an owner.
    OWNED: u32 = 1 << 9;
    /// Flag: a notifier is being removed from the address space, and may not have been called.
    LEAVING: u32 = 1 << 10;
}
