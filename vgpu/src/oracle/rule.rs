// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules, by name. What each rests on and why it spares correct drivers is in docs/rules.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! rules {
    ($($(#[doc = $about:literal])+ $variant:ident = $name:literal;)+) => {
        /// What can be broken.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Rule {
            $($(#[doc = $about])+ $variant,)+
        }

        impl Rule {
            /// Every rule, in the order of docs/rules.
            pub const ALL: &'static [Rule] = &[$(Rule::$variant,)+];

            /// Its stable name, `group/what`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Rule::$variant => $name,)+
                }
            }

            /// What must hold, one line.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self {
                    $(Rule::$variant => concat!($($about),+).trim_ascii(),)+
                }
            }
        }
    };
}

rules! {
    /// When release has returned for an address space, its contexts have no valid leaf, no TLB entry and no access in flight.
    ReleaseLate = "release/late";
    /// The same must hold, without exception, once exit's full-range UNMAP has returned.
    ReleaseMapped = "release/mapped";
    /// Nothing is mapped or accessed again for a released address space.
    ReleaseRevived = "release/revived";
    /// A context is released once.
    ReleaseTwice = "release/twice";
    /// After unregister nothing names the context, and no access goes through it.
    UnregisterTouch = "unregister/touch";
    /// Unregister and unload leave no page, queue, fault or notifier behind, and no reference to an address space.
    UnregisterLeak = "unregister/leak";
    /// No stale or made-up handle is used.
    UnknownHandle = "context/unknown-handle";
    /// A context is there, with the results of its newest jobs, until its owner ends it or its address space is released.
    ContextEndedEarly = "context/ended-early";
    /// Rings and buffers that the device is given can be used, and no index runs ahead of what they hold.
    RingUnusable = "ring/unusable";
    /// Memory of rings and buffers is given back when the device has let go of it.
    RingFreed = "ring/freed";
    /// When an UNMAP or CLEAR start has returned 0, no valid leaf is left in its range; after a PROTECTION_PAGE one, none that may write.
    InvalidateStalePte = "invalidate/stale-pte";
    /// Nor is a TLB entry.
    InvalidateStaleTlb = "invalidate/stale-tlb";
    /// Nor is an access in flight.
    InvalidateInFlight = "invalidate/in-flight";
    /// From the return of an UNMAP or CLEAR start to its end nothing is mapped in its range.
    InvalidateReestablished = "invalidate/reestablished";
    /// Every access goes to the frame that the CPU's page tables hold for its address.
    MirrorWrongPage = "mirror/wrong-page";
    /// Every access stays within the rights that the CPU's page tables give.
    MirrorExcessRights = "mirror/excess-rights";
    /// What the device wrote is not dropped as clean.
    MirrorDirtyLost = "mirror/dirty-lost";
    /// Device atomics on system memory go to device-exclusive entries only, unless the platform declares them coherent.
    MirrorAtomic = "mirror/atomic";
    /// Device-private pages are evicted before their owner closes or unloads.
    DevicePageOutlivesOwner = "memory/device-page-outlives-owner";
    /// Every fault is answered within so many guest heartbeats.
    FaultUnanswered = "fault/unanswered";
    /// A fault of a released address space is cancelled, never served.
    FaultAfterRelease = "fault/after-release";
    /// An access to a range that the workload declared stable does not fail.
    FaultSpuriousFatal = "fault/spurious-fatal";
    /// CPU and device read what the workload's model says.
    DataMismatch = "data/mismatch";
    /// No tasks wait for each other for ever.
    HangDeadlock = "hang/deadlock";
    /// Work that goes on gets done.
    HangLivelock = "hang/livelock";
    /// No finished work goes unnoticed.
    HangLostInterrupt = "hang/lost-interrupt";
    /// The kernel does not oops or panic.
    KernelOops = "kernel/oops";
    /// The kernel does not warn.
    KernelWarn = "kernel/warn";
    /// KASAN finds nothing.
    KernelKasan = "kernel/kasan";
    /// Lockdep finds nothing.
    KernelLockdep = "kernel/lockdep";
    /// No task hangs by the kernel's own detector.
    KernelHungTask = "kernel/hung-task";
    /// kmemleak finds nothing.
    KernelLeak = "kernel/leak";
}

impl Rule {
    /// The rule of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|rule| rule.name() == name)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::from_name(&name).ok_or_else(|| serde::de::Error::custom("there is no such rule"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Serialized(Rule);
    impl fmt::Display for Serialized {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.serialize(f)
        }
    }

    #[test]
    fn it_serialises_as_its_name() {
        assert_eq!(Serialized(Rule::ReleaseLate).to_string(), "release/late");
    }

    #[test]
    fn every_rule_has_a_section_in_the_docs() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rules");
        let mut sections = Vec::new();
        for page in std::fs::read_dir(folder).unwrap() {
            let page = page.unwrap().path();
            let text = std::fs::read_to_string(&page).unwrap();
            let group = page.file_stem().unwrap().to_str().unwrap().to_owned();
            let rules =
                text.lines().filter_map(|line| line.strip_prefix("## ")).filter(|name| name.contains('/'));
            sections.extend(rules.map(|name| (group.clone(), name.to_owned())));
        }
        for &rule in Rule::ALL {
            let group = rule.name().split('/').next().unwrap().to_owned();
            let mine = sections.iter().filter(|section| **section == (group.clone(), rule.name().to_owned()));
            assert_eq!(mine.count(), 1, "docs/rules/{group}.md has no section {rule}");
        }
        let index = std::fs::read_to_string(format!("{folder}/README.md")).unwrap();
        for (_, name) in sections {
            assert!(
                Rule::from_name(&name).is_some(),
                "docs/rules speaks of {name}, and there is no such rule"
            );
            assert!(index.contains(&format!("`{name}`")), "docs/rules/README.md does not list {name}");
        }
    }

    #[test]
    fn names_are_unique_and_lead_back() {
        for &rule in Rule::ALL {
            assert_eq!(Rule::from_name(rule.name()), Some(rule));
            assert_eq!(Rule::ALL.iter().filter(|other| other.name() == rule.name()).count(), 1);
            assert!(rule.about().ends_with('.'), "{rule}");
        }
        assert_eq!(Rule::from_name("release/never"), None);
    }
}
