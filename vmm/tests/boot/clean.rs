// SPDX-License-Identifier: MIT OR Apache-2.0
//! The reference driver is clean, and enough was done to say so.

use std::sync::Arc;

use hmm_testbench::event::EventSink;
use hmm_testbench::provision::{Cache, Provisioner};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection};

use crate::support::{Finished, machine, run};

#[track_caller]
fn enough(finished: &Finished) {
    finished.expect_status(0);
    assert_eq!(finished.results["verdict"], "clean");
    assert_eq!(finished.violations().len(), 0, "{:?}", finished.violations());
    assert_eq!(finished.counter("probes_missed"), 0);
    for (name, least) in [
        ("contexts", 1_000),
        ("releases", 200),
        ("unregisters", 1_000),
        ("address_spaces", 200),
        ("accesses", 1_000_000),
        ("distinct_pages", 50_000),
        ("tlb_misses", 50_000),
        ("invalidations", 10_000),
        ("faults", 1_000),
    ] {
        assert!(finished.counter(name) >= least, "{name}: {} < {least}", finished.counter(name));
    }
    let workloads = finished.results["workloads"].as_array().expect("a list of workloads");
    assert_eq!(workloads.len(), guest_protocol::WORKLOADS.iter().filter(|workload| workload.suite).count());
    for workload in workloads {
        assert_eq!(workload["outcome"], "pass", "{workload}");
    }
}

#[test]
fn the_default_suite_is_clean_with_two_cpus() {
    let _one = machine();
    enough(&run(["--cpus", "2", "--seed", "1"]));
}

#[test]
fn the_default_suite_is_clean_with_one_cpu_and_with_four() {
    let _one = machine();
    enough(&run(["--cpus", "1", "--seed", "2"]));
    enough(&run(["--cpus", "4", "--seed", "3"]));
}

#[test]
fn the_older_kernels_run_the_same_driver() {
    let _one = machine();
    for kernel in ["bookworm", "trixie"] {
        let finished = run(["access", "release", "unregister", "--kernel", kernel, "--seed", "4"]);
        finished.expect_status(0);
        assert!(finished.counter("contexts") > 0, "{kernel}");
        assert_eq!(finished.counter("probes_missed"), 0, "{kernel}");
    }
}

#[test]
fn without_the_oracle_nothing_is_judged_but_the_suite_runs() {
    let _one = machine();
    let finished = run(["access", "--no-oracle", "--seed", "5"]);
    finished.expect_status(0).expect_said("oracle");
    assert_eq!(finished.results["oracle"], false);
    assert_eq!(finished.counter("events"), 0, "nothing was traced, so nothing can have been judged");
}

#[test]
fn a_program_of_the_users_own_runs_and_its_status_is_reported() {
    let _one = machine();
    let finished =
        run(["access", "--iterations", "1", "--add", "/bin/true", "--exec", "/add/true", "--seed", "6"]);
    finished.expect_status(0);
    assert_eq!(finished.results["exec_status"], 0);
    let finished =
        run(["access", "--iterations", "1", "--add", "/bin/false", "--exec", "/add/false", "--seed", "6"]);
    assert_eq!(finished.results["exec_status"], 1);
    finished.expect_status(3);
}

#[test]
fn a_program_that_does_not_use_the_device_is_no_evidence() {
    let _one = machine();
    run(["--add", "/bin/true", "--exec", "/add/true", "--seed", "6"])
        .expect_status(3)
        .expect_said("no evidence");
}

/// A built driver whose module has another name than ours, of the same length.
fn of_another_name(name: &[u8; 8]) -> tempfile::NamedTempFile {
    let events: Arc<dyn EventSink> = Arc::new(|_| {});
    let provisioner = Provisioner::new(Cache::from_env().unwrap(), events);
    let kernel = provisioner.kernel("backports").unwrap();
    let mut bytes = std::fs::read(provisioner.modules(&kernel, &[]).unwrap().driver).unwrap();
    let places: Vec<usize> = {
        let file: ElfFile64<'_> = ElfFile64::parse(&*bytes).unwrap();
        [(".gnu.linkonce.this_module", &b"hmm_vgpu\0"[..], 0), (".modinfo", b"\0name=hmm_vgpu\0", 6)]
            .iter()
            .map(|(section, text, skip)| {
                let section = file.section_by_name(section).unwrap();
                let at = section.data().unwrap().windows(text.len()).position(|window| window == *text);
                section.file_range().unwrap().0 as usize + at.unwrap() + skip
            })
            .collect()
    };
    for at in places {
        bytes[at..at + name.len()].copy_from_slice(name);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_driver_of_the_users_own_is_unloaded_by_its_own_name() {
    let _one = machine();
    let driver = of_another_name(b"hmm_mine");
    let path = driver.path().to_str().unwrap();
    let finished = run(["access", "--iterations", "1", "--driver", path, "--seed", "6"]);
    finished.expect_status(0);
    assert!(finished.results["module_texts"]["hmm_mine"].is_u64(), "{}", finished.results["module_texts"]);
}
