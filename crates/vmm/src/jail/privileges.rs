//! User, group and capabilities.

use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use strake_observe::{OsContext, Result};

/// From root to an unprivileged user and group, with no other group. The process has one thread,
/// which is all that these calls change.
pub(super) fn become_user(uid: u32, gid: u32) -> Result<()> {
    for capability in CapabilitySet::all() {
        // EINVAL: the kernel does not know it, so nobody can have it.
        match remove_capability_from_bounding_set(capability) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).os("prctl", "PR_CAPBSET_DROP"),
        }
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[]).os("setgroups", "no group")?;
    set_thread_res_gid(gid, gid, gid).os("setresgid", gid.as_raw())?;
    set_thread_res_uid(uid, uid, uid).os("setresuid", uid.as_raw())
}

/// No capability, no way to gain one, and nobody of the same user may look inside.
pub(super) fn renounce() -> Result<()> {
    // EINVAL: kernels before 4.3 have no ambient set.
    match clear_ambient_capability_set() {
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error).os("prctl", "PR_CAP_AMBIENT"),
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).os("capset", "no capability")?;
    set_no_new_privs(true).os("prctl", "PR_SET_NO_NEW_PRIVS")?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).os("prctl", "PR_SET_DUMPABLE")
}
