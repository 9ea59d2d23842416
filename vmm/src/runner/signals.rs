// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ctrl-C and its relatives: the first ends the run in order, a later one at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::{Failure, FailureKind, Result};

/// Signals that come so soon after the first are the same wish: timeout(1) sends each twice, a terminal to the whole group.
const SAME_WISH: Duration = Duration::from_millis(500);

/// A flag that is set when the user or the system wants an end.
pub fn interrupted() -> Result<Arc<AtomicBool>> {
    let trouble = |error: std::io::Error| Failure::environment(format!("cannot handle signals: {error}"));
    let flag = Arc::new(AtomicBool::new(false));
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(trouble)?;
    let theirs = Arc::clone(&flag);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut first = None;
            for _ in signals.forever() {
                theirs.store(true, Ordering::SeqCst);
                let first = *first.get_or_insert_with(Instant::now);
                if first.elapsed() > SAME_WISH {
                    // The machine notices that this process has gone, and goes too.
                    std::process::exit(i32::from(FailureKind::Inconclusive.exit_status()));
                }
            }
        })
        .map_err(trouble)?;
    Ok(flag)
}
