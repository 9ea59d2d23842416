// SPDX-License-Identifier: MIT OR Apache-2.0
//! kmemleak, where the kernel has it and the command line turns it on: what was left behind is told on the console, one object after
//! the other, and the host reads it there.

use std::fs::write;
use std::path::Path;
use std::time::Duration;

use guest_protocol::Message;

use crate::report::{Host, Sink};

const CONTROL: &str = "/sys/kernel/debug/kmemleak";
const VERBOSE: &str = "/sys/module/kmemleak/parameters/verbose";
/// Younger objects are not told of: they may be on their way to whoever will hold them (`MSECS_MIN_AGE` in mm/kmemleak.c).
const AGE: Duration = Duration::from_millis(5500);

/// How often the host is told that a look goes on: on a slow kernel it takes longer than a guest may be silent.
const WORD: Duration = Duration::from_secs(2);

/// Looks twice, for an object counts only if nothing has written to it between two looks; false if there is no kmemleak.
fn look(host: &Host) -> bool {
    Path::new(CONTROL).exists() && scan(host) && {
        std::thread::sleep(AGE);
        scan(host)
    }
}

fn scan(host: &Host) -> bool {
    std::thread::scope(|scope| {
        let scan = scope.spawn(|| write(CONTROL, "scan").is_ok());
        let mut done = 0;
        loop {
            std::thread::sleep(Duration::from_millis(20));
            if scan.is_finished() {
                return scan.join().unwrap_or(false);
            }
            done += 1;
            if done % (WORD.as_millis() as u64 / 20) == 0 {
                host.send(&Message::Progress { workload: "kmemleak".to_owned(), done, total: None });
            }
        }
    })
}

/// Before the driver is loaded: what looks lost by now is not the driver's.
pub(crate) fn forget(host: &Host) {
    if look(host) {
        let _ = write(CONTROL, "clear");
    }
}

/// After the driver is unloaded: whatever looks lost now is told.
pub(crate) fn tell(host: &Host) {
    let _ = write(VERBOSE, "Y");
    let _ = look(host);
}
