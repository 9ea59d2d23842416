// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several trials at a time, told of in the order in which they stand.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use crate::failure::Result;

/// Does `work` for 0 to `count`, at most so many at a time, and gives `take` what came of each, in order. The first that fails, or
/// a `take` that says no, ends it: no further one is begun, and `stop` is set for those that are under way.
///
/// # Errors
/// A failure of those that were begun: the first in order of those that are known.
pub(super) fn in_order<T: Send>(
    jobs: NonZeroUsize,
    count: usize,
    stop: &AtomicBool,
    work: impl Fn(usize) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> bool,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let (done, results) = channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs.get().min(count) {
            let done = done.clone();
            let (next, work) = (&next, &work);
            // What a trial starts dies with the thread that started it, which stays until the trial is over.
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    if index >= count {
                        break;
                    }
                    let result = work(index);
                    match result {
                        // It may have been cut short: nothing is to be learned from it.
                        Ok(_) if stop.load(Ordering::SeqCst) => break,
                        Ok(_) => {}
                        Err(_) => stop.store(true, Ordering::SeqCst),
                    }
                    // Nobody listens any more once one has failed.
                    let _ = done.send((index, result));
                }
            });
        }
        drop(done);
        let (mut waiting, mut at) = (BTreeMap::new(), 0);
        for (index, result) in results {
            waiting.insert(index, result);
            while let Some(result) = waiting.remove(&at) {
                at += 1;
                if !take(result?) {
                    stop.store(true, Ordering::SeqCst);
                    return Ok(());
                }
            }
        }
        // Behind one that was never begun.
        waiting.into_values().find_map(Result::err).map_or(Ok(()), Err)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::failure::Failure;

    fn jobs(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).unwrap()
    }

    #[test]
    fn results_come_in_order_whoever_is_first() {
        for at_once in [1, 3, 50] {
            let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let work = |index: usize| {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(if index % 3 == 0 { 20 } else { 1 }));
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(index)
            };
            let mut seen = Vec::new();
            in_order(jobs(at_once), 20, &AtomicBool::new(false), work, |index| {
                seen.push(index);
                true
            })
            .unwrap();
            assert_eq!(seen, (0..20).collect::<Vec<_>>());
            assert!(most.into_inner() <= at_once);
        }
    }

    #[test]
    fn a_failure_ends_it_and_is_told() {
        for at_once in [1, 4] {
            let (begun, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
            let work = |index: usize| {
                begun.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
                if index == 5 { Err(Failure::environment("no disk")) } else { Ok(index) }
            };
            let mut seen = Vec::new();
            let failure = in_order(jobs(at_once), 1000, &stop, work, |index| {
                seen.push(index);
                true
            });
            assert_eq!(failure.unwrap_err().what, "no disk");
            assert_eq!(seen, (0..seen.len()).collect::<Vec<_>>());
            assert!(seen.len() <= 5 && stop.into_inner() && begun.into_inner() < 1000);
        }
    }

    #[test]
    fn whoever_takes_can_end_it() {
        let (begun, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = |index: usize| {
            begun.fetch_add(1, Ordering::SeqCst);
            Ok(index)
        };
        let mut taken = 0;
        in_order(jobs(2), 100_000, &stop, work, |_| {
            taken += 1;
            taken < 3
        })
        .unwrap();
        assert_eq!(taken, 3);
        assert!(begun.into_inner() < 100_000);
        in_order(jobs(2), 0, &AtomicBool::new(false), |_| Ok(()), |()| panic!("nothing to take")).unwrap();
    }
}
