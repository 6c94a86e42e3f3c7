//! Landlock: files, TCP ports, abstract sockets and signals to others are out of reach.
//!
//! Descriptors that come over the control socket keep the rights with which the daemon opened them.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};
use strake_observe::{Observation, OsCallFailed};

use crate::observations::JailReduced;

/// Denies everything that this kernel can deny. What it cannot is no failure: the empty root and
/// the system call lists say the same once more. None is returned if all went well.
pub(super) fn restrict() -> Option<Observation> {
    match deny_all() {
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => None,
        Ok(RulesetStatus::NotEnforced) => Some(reduced().into()),
        Err(error) => {
            let cause = OsCallFailed::new(
                "landlock_restrict_self",
                "the monitor",
                &std::io::Error::other(error.to_string()),
            );
            Some(Observation::from(reduced()).because(cause))
        }
    }
}

fn deny_all() -> Result<RulesetStatus, RulesetError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset)
}

fn reduced() -> JailReduced {
    JailReduced {
        missing: "landlock, which its kernel lacks".to_owned(),
    }
}
