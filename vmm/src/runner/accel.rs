// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who runs the guest's instructions, and why.

use std::io::IsTerminal;

use crate::doctor;
use crate::failure::{Failure, Result};
use crate::machine::Accel;

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
        _ => doctor::kvm_can_run_linux(),
    };
    decide(demanded, usable, reason)
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
        assert_eq!(choose(Some(Accel::Tcg)).unwrap().accel, Accel::Tcg);
    }
}
