//! What a client may ask for: the check of each request before anything is done for it.

use crate::protocol::MAX_PAYLOAD;
use crate::protocol::transmission::{RequestHead, command, command_flag, error};

/// What the session's client may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The export's size in bytes.
    pub size: u64,
    /// Whether it may write.
    pub writable: bool,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether it may ask for the status of blocks.
    pub allocation: bool,
}

/// What to do for a request. Ranges are whole sectors within the export, but for a read, which may
/// begin and end anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Read.
    Read {
        /// In one chunk.
        whole: bool,
    },
    /// Write the payload.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Discard.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Whether the space may be given back.
        hole: bool,
        /// Fail if it takes as long as writing.
        fast: bool,
    },
    /// Tell what is allocated.
    Status {
        /// One extent only.
        one: bool,
    },
    /// Nothing: a request about no byte.
    Nothing,
    /// End the session once everything before it has ended.
    Disconnect,
    /// Refuse it, with an error and words for people.
    Refuse(u32, &'static str),
    /// End the session at once: the payload is too long to be skipped.
    HangUp,
}

/// How many bytes of payload follow a request's head.
#[must_use]
pub fn payload_of(head: &RequestHead) -> u32 {
    match head.command {
        command::WRITE => head.length,
        _ => 0,
    }
}

/// Checks a request.
#[must_use]
pub fn check(head: &RequestHead, limits: &Limits) -> Action {
    if payload_of(head) > MAX_PAYLOAD {
        return Action::HangUp;
    }
    let has = |flag: u16| head.flags & flag != 0;
    // FUA must be taken with every command.
    let allowed = command_flag::FUA
        | match head.command {
            command::READ if limits.structured => command_flag::DF,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => 0,
        };
    if head.flags & !allowed != 0 && head.command != command::DISC {
        return Action::Refuse(error::EINVAL, "a flag that does not go with the command");
    }
    let within = head
        .offset
        .checked_add(u64::from(head.length))
        .is_some_and(|end| end <= limits.size);
    let sectors = head.offset.is_multiple_of(512) && head.length.is_multiple_of(512);
    let fua = has(command_flag::FUA);
    let action = match head.command {
        command::DISC => return Action::Disconnect,
        command::FLUSH => return Action::Flush,
        command::READ => Action::Read {
            whole: has(command_flag::DF),
        },
        command::WRITE => Action::Write { fua },
        command::TRIM => Action::Trim { fua },
        command::WRITE_ZEROES => Action::WriteZeroes {
            fua,
            hole: !has(command_flag::NO_HOLE),
            fast: has(command_flag::FAST_ZERO),
        },
        command::BLOCK_STATUS if limits.allocation => Action::Status {
            one: has(command_flag::REQ_ONE),
        },
        command::BLOCK_STATUS => {
            return Action::Refuse(error::EINVAL, "no metadata context was chosen");
        }
        _ => return Action::Refuse(error::EINVAL, "an unknown command"),
    };
    let reads = matches!(action, Action::Read { .. } | Action::Status { .. });
    if !reads && !limits.writable {
        return Action::Refuse(error::EPERM, "the export is read-only");
    }
    if !within {
        let beyond = match action {
            Action::Write { .. } | Action::WriteZeroes { .. } => error::ENOSPC,
            _ => error::EINVAL,
        };
        return Action::Refuse(beyond, "beyond the end of the export");
    }
    if head.length == 0 {
        return match action {
            Action::Status { .. } => Action::Refuse(error::EINVAL, "the status of no byte"),
            _ => Action::Nothing,
        };
    }
    if !reads && !sectors {
        return Action::Refuse(error::EINVAL, "not in sectors of 512 bytes");
    }
    if matches!(action, Action::Read { .. }) && head.length > MAX_PAYLOAD {
        return Action::Refuse(error::EOVERFLOW, "more than 32 MiB at once");
    }
    action
}
