//! Tap devices: the host's end of a guest's network interface.
//!
//! A tap that does not exist is created with the VM's start and disappears when the monitor lets
//! go of it; one that the operator made stays.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use strake_observe::{Because, OsContext, Result};

use crate::observations::TapUnavailable;

const TUN: &str = "/dev/net/tun";

/// Adds a port to a bridge (`linux/sockios.h`); the `libc` crate lacks it.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Opens the tap for a monitor, up and, if asked, a port of `bridge`.
pub(crate) fn open_tap(tap: &str, bridge: Option<&str>) -> Result<OwnedFd> {
    attach(tap, bridge).map_err(|seen| {
        let errno = seen
            .find("os.call-failed")
            .and_then(|call| call.datum("name"))
            .and_then(|name| name.as_str().map(str::to_owned));
        let advice = match errno.as_deref() {
            Some("EBUSY") => format!("'{tap}' is in use: stop what uses it or name another tap"),
            Some("EPERM") => "run straked with the capability CAP_NET_ADMIN".to_owned(),
            Some("ENOENT") => "load the kernel's module 'tun'".to_owned(),
            Some("ENODEV") => format!("create the bridge first: the tap '{tap}' is to join it"),
            _ => format!("check the network device with `ip link show {tap}`"),
        };
        strake_observe::Observation::from(TapUnavailable {
            tap: tap.to_owned(),
            advice,
        })
        .because(seen)
    })
}

fn attach(tap: &str, bridge: Option<&str>) -> Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .os("open", TUN)?;
    let mut request = request(tap);
    request.ifr_ifru.ifru_flags = flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    ioctl(device.as_fd(), libc::TUNSETIFF, &mut request).os("ioctl(TUNSETIFF)", tap)?;
    let control = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .os("socket", tap)?;
    if let Some(bridge) = bridge {
        join(control.as_fd(), tap, bridge)?;
    }
    bring_up(control.as_fd(), tap)?;
    Ok(device.into())
}

fn join(control: BorrowedFd<'_>, tap: &str, bridge: &str) -> Result<()> {
    let mut port = request(tap);
    ioctl(control, libc::SIOCGIFINDEX, &mut port).os("ioctl(SIOCGIFINDEX)", tap)?;
    let mut of = request(bridge);
    // SAFETY: SIOCGIFINDEX filled in the index.
    of.ifr_ifru.ifru_ifindex = unsafe { port.ifr_ifru.ifru_ifindex };
    match ioctl(control, SIOCBRADDIF, &mut of) {
        // A tap that the operator made may be a port already.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) && is_port(tap, bridge) => Ok(()),
        result => result.os("ioctl(SIOCBRADDIF)", format!("{bridge} for {tap}")),
    }
    .because_of(|| TapUnavailable {
        tap: tap.to_owned(),
        advice: format!("check that '{bridge}' is a bridge: `ip link show {bridge}`"),
    })
}

fn is_port(tap: &str, bridge: &str) -> bool {
    std::fs::read_link(format!("/sys/class/net/{tap}/master"))
        .is_ok_and(|master| master.file_name().is_some_and(|name| name == bridge))
}

fn bring_up(control: BorrowedFd<'_>, tap: &str) -> Result<()> {
    let mut request = request(tap);
    ioctl(control, libc::SIOCGIFFLAGS, &mut request).os("ioctl(SIOCGIFFLAGS)", tap)?;
    // SAFETY: SIOCGIFFLAGS filled in the flags.
    let has = unsafe { request.ifr_ifru.ifru_flags };
    let up = flags(libc::IFF_UP);
    if has & up != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = has | up;
    ioctl(control, libc::SIOCSIFFLAGS, &mut request).os("ioctl(SIOCSIFFLAGS)", tap)
}

/// A request about the network device `name`.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The spec's rules leave room for the final zero.
    let last = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(last).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// The flags as `ifreq` has them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the kernel's flags of this structure fit 16 bits"
)]
const fn flags(of: libc::c_int) -> libc::c_short {
    of as libc::c_short
}

fn ioctl(on: BorrowedFd<'_>, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each of the calls above takes a pointer to one `ifreq`, which it reads and writes.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), what, &raw mut *request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_up_and_opened_once() {
        let tap = format!("strkt{}", std::process::id() % 100_000);
        let held = match open_tap(&tap, None) {
            Ok(held) => held,
            Err(seen) => {
                // A host without the module or the right says so, and what to do.
                assert_eq!(seen.id(), "host.tap-unavailable");
                assert!(seen.find("os.call-failed").is_some());
                eprintln!("skipped: {seen}");
                return;
            }
        };
        let flags = std::fs::read_to_string(format!("/sys/class/net/{tap}/flags")).unwrap();
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap();
        assert_eq!(flags & libc::IFF_UP.unsigned_abs(), 1);
        let seen = open_tap(&tap, None).unwrap_err();
        assert!(seen.remedy().contains("in use"), "{seen} {}", seen.remedy());
        let seen = open_tap("strkt-other", Some("no-such-bridge")).unwrap_err();
        assert!(seen.find("os.call-failed").is_some(), "{seen}");
        drop(held);
        assert!(!std::path::Path::new(&format!("/sys/class/net/{tap}")).exists());
    }
}
