//! The server as a front-end meets it: with the front-end of the `vhost` crate, whose guest's memory
//! and rings the test writes itself.
#![allow(clippy::cast_possible_truncation)]

mod front_end;
mod hostile;
mod serving;
