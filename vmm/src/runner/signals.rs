// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ctrl-C and its relatives: the first ends the run in order, the second at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::{Failure, FailureKind, Result};

/// A flag that is set when the user or the system wants an end.
pub fn interrupted() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let status = i32::from(FailureKind::Inconclusive.exit_status());
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: at the first signal the flag is not set yet when the first of the two looks at it.
        flag::register_conditional_shutdown(signal, status, Arc::clone(&flag))
            .and_then(|_| flag::register(signal, Arc::clone(&flag)))
            .map_err(|error| Failure::environment(format!("cannot handle signal {signal}: {error}")))?;
    }
    Ok(flag)
}
