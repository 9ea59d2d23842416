// SPDX-License-Identifier: MIT OR Apache-2.0
//! Command lines that find a violation again, quoted for a shell.

use std::path::Path;

use guest_protocol::{Extent, NUMA_WORKLOAD};

use super::RunConfig;
use crate::cli::units::{show_millis, show_size};
use crate::cli::{AtomicsName, BackendName, DEFAULT_CPUS, DEFAULT_KERNEL, DEFAULT_MACHINE};
use crate::gates::order::Order;

/// Words as one line that a POSIX shell reads back as the same words.
#[must_use]
pub fn quote<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    let quoted: Vec<String> = words.into_iter().map(|word| quote_word(word.as_ref())).collect();
    quoted.join(" ")
}

fn quote_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The command that finds again what was found in `workload`, or in the run as a whole if it was in none.
#[must_use]
pub fn command(config: &RunConfig, workload: Option<&str>) -> String {
    command_in_order(config, workload, None)
}

/// The same, with the order of gates in which it was found, where that was chosen.
#[must_use]
pub fn command_in_order(config: &RunConfig, workload: Option<&str>, order: Option<String>) -> String {
    let mut words: Vec<String> = vec![config.program.clone(), "run".into()];
    match workload {
        Some(workload) if from_file(config, workload) => {}
        Some(workload) => words.push(workload.into()),
        None => words.extend(config.workloads.iter().filter(|name| !from_file(config, name)).cloned()),
    }
    if config.machine != DEFAULT_MACHINE {
        words.extend(["--machine".into(), config.machine.to_string()]);
    }
    if config.nested {
        words.push("--nested".into());
    }
    let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
    if let Some(accel) = config.accel {
        option("--accel", accel.to_string());
    }
    if config.outer_cpus != 1 {
        option("--outer-cpus", config.outer_cpus.to_string());
    }
    if config.outer_kernel != DEFAULT_KERNEL {
        option("--outer-kernel", config.outer_kernel.clone());
    }
    if let Some(vfio) = &config.vfio {
        option("--vfio", vfio.to_string());
    }
    if config.kernel != DEFAULT_KERNEL {
        let tree = Path::new(&config.kernel);
        option("--kernel", if tree.is_dir() { absolute(tree) } else { config.kernel.clone() });
    }
    if config.cpus != DEFAULT_CPUS {
        option("--cpus", config.cpus.to_string());
    }
    option("--memory", show_size(config.memory_bytes));
    // Of what is to be run alone the nodes must not be chosen anew.
    let numa = |name: &str| name == NUMA_WORKLOAD;
    if config.nodes != 1 || workload.map_or_else(|| config.workloads.iter().any(|name| numa(name)), numa) {
        option("--nodes", config.nodes.to_string());
    }
    if config.backend != BackendName::Interval {
        option("--backend", config.backend.to_string());
    }
    if let Some(policy) = config.policy {
        option("--mirror-policy", policy.to_string());
    }
    if config.atomics != AtomicsName::Coherent {
        option("--atomics", config.atomics.to_string());
    }
    if let Some(driver) = &config.driver {
        option("--driver", absolute(driver));
    }
    for patch in &config.patches {
        option("--patch", absolute(patch));
    }
    let of_scenario = |name: &str| config.scenario.as_ref().is_some_and(|scenario| scenario.name == name);
    if workload.is_none_or(of_scenario) {
        if let Some(file) = &config.scenario_file {
            option("--scenario", absolute(file));
        }
        if let Some(order) = order.or_else(|| config.gate_order.as_ref().map(Order::to_string)) {
            option("--gate-order", order);
        }
    }
    option("--seed", config.seed.to_string());
    match config.extent {
        Extent::Default => {}
        Extent::Iterations(count) => option("--iterations", count.to_string()),
        Extent::Milliseconds(millis) => option("--duration", show_millis(millis)),
    }
    // A command of the user's may be what did it, unless it was in a workload; those run before it.
    if workload.is_none() {
        for add in &config.add {
            option("--add", format!("{}:{}", absolute(&add.host), add.guest));
        }
        if let Some(exec) = &config.exec {
            option("--exec", exec.clone());
        }
        if config.shell {
            words.push("--shell".into());
        }
    }
    if let Some(append) = &config.append {
        // As one word, since it may begin with a hyphen.
        words.push(format!("--append={append}"));
    }
    if let Some(allow) = &config.allow {
        words.extend(["--allow".into(), absolute(&allow.file)]);
    }
    if !config.oracle {
        words.push("--no-oracle".into());
    }
    quote(words)
}

/// How a scenario was run, as its diagram says it: what the reader has to know, without paths and seeds.
#[must_use]
pub fn diagram_of(config: &RunConfig) -> String {
    let mut words = vec!["hmm-testbench".to_owned(), "run".to_owned()];
    words.extend(config.scenario.iter().map(|scenario| scenario.name.clone()));
    for patch in &config.patches {
        let name = patch.file_name().unwrap_or_default().to_string_lossy().into_owned();
        words.extend(["--patch".to_owned(), name]);
    }
    quote(words)
}

/// A scenario that a file names, and not a word on the command line.
fn from_file(config: &RunConfig, name: &str) -> bool {
    config.scenario_file.is_some() && config.scenario.as_ref().is_some_and(|scenario| scenario.name == name)
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).as_deref().unwrap_or(path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_needed() {
        assert_eq!(
            quote(["run", "a b", "", "it's", "$HOME", "/a-b_c.d=e"]),
            r"run 'a b' '' 'it'\''s' '$HOME' /a-b_c.d=e"
        );
    }

    #[test]
    fn a_shell_reads_the_words_back() {
        let words = ["printf", "%s\\n", "a  b", "it's", "\"q\"", "`x`", "$(y)", "*", "new\nline", ""];
        let output = std::process::Command::new("/bin/sh").arg("-c").arg(quote(words)).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words[2..].join("\n") + "\n");
    }

    #[test]
    fn the_command_is_the_runs_own_with_one_workload() {
        let mut config = RunConfig::for_tests();
        config.seed = 42;
        config.patches = vec!["/tmp/my patch".into()];
        config.extent = Extent::Milliseconds(30_000);
        config.exec = Some("echo hi; exit 1".into());
        assert_eq!(
            command(&config, Some("release")),
            "hmm-testbench run release --memory 1G --patch '/tmp/my patch' --seed 42 --duration 30s"
        );
        assert_eq!(
            command(&config, None),
            "hmm-testbench run access release --memory 1G --patch '/tmp/my patch' --seed 42 --duration 30s --exec 'echo hi; exit 1'"
        );
    }

    #[test]
    fn a_scenario_is_named_with_its_order() {
        let mut config = RunConfig::for_tests();
        config.scenario = crate::gates::built_in("fault-under-invalidate").unwrap();
        config.workloads = vec!["fault-under-invalidate".into(), "access".into()];
        config.gate_order = Some(Order::Seed(3));
        let found =
            command_in_order(&config, Some("fault-under-invalidate"), Some("found@fault,drop@D".into()));
        assert_eq!(
            found,
            "hmm-testbench run fault-under-invalidate --memory 1G --gate-order found@fault,drop@D --seed 1"
        );
        assert_eq!(command(&config, Some("access")), "hmm-testbench run access --memory 1G --seed 1");
        config.scenario_file = Some("/tmp/x.toml".into());
        assert_eq!(
            command(&config, None),
            "hmm-testbench run access --memory 1G --scenario /tmp/x.toml --gate-order 3 --seed 1"
        );
    }

    #[test]
    fn the_command_is_read_back_by_the_grammar() {
        use clap::Parser;
        let mut config = RunConfig::for_tests();
        config.cpus = 4;
        config.kernel = "bookworm".into();
        config.accel = Some(crate::machine::Accel::Tcg);
        config.oracle = false;
        config.machine = crate::cli::MachineName::Kvm;
        config.nested = true;
        config.outer_cpus = 2;
        config.outer_kernel = "built:host".into();
        config.atomics = AtomicsName::Exclusive;
        config.vfio = Some(crate::cli::vfio::Vfio::Edu);
        config.backend = BackendName::Mirror;
        config.policy = Some(crate::cli::PolicyName::SrcuNowait);
        let line = command(&config, Some("access"));
        assert!(line.contains(" --machine kvm --nested "), "{line}");
        assert!(line.contains(" --vfio edu "), "{line}");
        assert!(line.contains(" --atomics exclusive "), "{line}");
        assert!(line.contains(" --backend mirror --mirror-policy srcu-nowait "), "{line}");
        crate::cli::Cli::try_parse_from(line.split(' ')).expect(&line);
    }
}
