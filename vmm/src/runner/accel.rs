// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who runs the guest's instructions, and why.

use std::io::IsTerminal;

use super::RunConfig;
use crate::cli::MachineName;
use crate::doctor;
use crate::failure::{Failure, Result};
use crate::machine::{Accel, probe};
use crate::nested;

/// A choice with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What was chosen.
    pub accel: Accel,
    /// Why, for the first line of output.
    pub reason: String,
}

/// Chooses: what is demanded, or KVM where it can run Linux. KVM that is demanded and unusable is a failure, never TCG.
pub fn choose(demanded: Option<Accel>) -> Result<Choice> {
    let (usable, reason) = match demanded {
        Some(Accel::Tcg) => (false, "asked for with --accel tcg".to_owned()),
        Some(Accel::Kvm) => doctor::kvm_can_run_linux(probe::DEADLINE),
        None => doctor::kvm_worth_having(),
    };
    decide(demanded, usable, reason)
}

/// Chooses for a run, which may be nested.
pub fn choose_for(config: &RunConfig) -> Result<Choice> {
    if config.nested {
        // Whether it is so is seen inside, which fails if it is not.
        return Ok(Choice { accel: Accel::Kvm, reason: nested::ACCEL_REASON.to_owned() });
    }
    match (config.machine, config.accel) {
        (MachineName::Qemu, demanded) => choose(demanded),
        (MachineName::Kvm, Some(Accel::Tcg)) => {
            Err(Failure::usage("--machine kvm has no translator: --accel tcg needs --machine qemu"))
        }
        (MachineName::Kvm, _) => choose(Some(Accel::Kvm)).map_err(|failure| {
            failure.remedy(
                "give --nested, which emulates a host with KVM, or --machine qemu, which works everywhere",
            )
        }),
    }
}

/// Chooses in an outer guest: KVM, or a failure.
pub fn choose_inside() -> Result<Choice> {
    let (usable, reason) = doctor::kvm_can_run_linux(probe::EMULATED_DEADLINE);
    if usable {
        return Ok(Choice { accel: Accel::Kvm, reason });
    }
    Err(Failure::environment(format!("the emulated processor's KVM cannot run Linux: {reason}")))
}

fn decide(demanded: Option<Accel>, usable: bool, reason: String) -> Result<Choice> {
    match (demanded, usable) {
        (Some(Accel::Kvm), false) => {
            Err(Failure::environment(format!("--accel kvm: KVM cannot run Linux here: {reason}"))
                .remedy("leave --accel away or give --accel tcg, which is slower and works everywhere"))
        }
        (Some(Accel::Tcg), _) | (None, false) => Ok(Choice { accel: Accel::Tcg, reason }),
        (Some(Accel::Kvm) | None, true) => Ok(Choice { accel: Accel::Kvm, reason }),
    }
}

/// A shell needs somebody to type.
pub fn require_terminal() -> Result<()> {
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        return Ok(());
    }
    Err(Failure::usage("--shell needs a terminal")
        .remedy("use --exec 'COMMAND' to run something without one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_never_silently_replaced() {
        let error = decide(Some(Accel::Kvm), false, "no vmx".into()).unwrap_err();
        assert_eq!(error.kind.exit_status(), 4);
        assert!(error.to_string().contains("no vmx"));
        assert_eq!(decide(None, false, "r".into()).unwrap().accel, Accel::Tcg);
        assert_eq!(decide(None, true, "r".into()).unwrap().accel, Accel::Kvm);
        assert_eq!(decide(Some(Accel::Kvm), true, "r".into()).unwrap().accel, Accel::Kvm);
        let mut config = RunConfig::for_tests();
        config.accel = Some(Accel::Tcg);
        assert_eq!(choose_for(&config).unwrap().accel, Accel::Tcg);
        config.accel = None;
        config.nested = true;
        assert_eq!(choose_for(&config).unwrap().accel, Accel::Kvm);
    }
}
