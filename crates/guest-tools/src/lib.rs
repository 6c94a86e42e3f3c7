//! Programs that run inside a guest under test, and the checks of what they leave behind.
//!
//! * `strake-guest-stamp` ([`stamp`]) writes to a raw disk without pause, remembers every write
//!   that was acknowledged, and verifies all of it, inside of the guest and later, from the image
//!   file, outside.
//! * `strake-guest-echo` ([`echo`]) answers lines over TCP, and its client mode says whether a
//!   connection stayed open and how long the longest answer took.
//!
//! Both are built static and go into an initial RAM disk that has nothing else, so they depend on
//! the system call wrappers alone, and their errors are texts for the test's log.

pub mod arguments;
pub mod echo;
pub mod random;
pub mod signal;
pub mod stamp;
