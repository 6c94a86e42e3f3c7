//! What an image has goes into the one below it, while nobody uses either.
//!
//! The image below changes only where the upper one hides it: whoever reads through the upper one
//! sees the same at any instant, and it may be begun again after a crash at any place.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_api::image::ImageFormat;
use strake_block::{Access, Image, RawImage};
use strake_observe::{OsContext, Result};
use strake_qcow2::{ChainPart, Commit, FileStore, Format, Progress, open_chain};

use super::chain::{OpenImage, OpenLayer};
use super::location::Binding;
use crate::config::show;
use crate::observations::ImageRefused;

/// What is copied between two looks at anything else.
const STEP: u64 = 64 << 20;

/// Merges `upper`, a chain that is held open, into the image below its first, which `file` has open
/// for writing. It is durable when this returns.
pub(crate) fn into_below(upper: &OpenImage, below: &Binding, file: &OwnedFd) -> Result<()> {
    let path = show(below.file()?);
    let refused = |reason: &str| ImageRefused {
        path: path.clone(),
        reason: reason.to_owned(),
        advice: "look at the chain with `qemu-img info --backing-chain`; nothing was changed"
            .to_owned(),
    };
    let child = open_chain(parts(upper.layers(), None)?)?;
    let fd = file.try_clone().os("dup", &path)?;
    let lower = upper.layers().get(1..).unwrap_or_default();
    let same = lower
        .first()
        .is_some_and(|first| first.format == below.format && first.is(&fd).unwrap_or(false));
    if !same {
        return Err(refused("it is not what is below the disk's image").into());
    }
    let parent: Arc<dyn Image> = match below.format {
        ImageFormat::Raw => Arc::new(RawImage::from_fd(fd, &path, Access::ReadWrite)?),
        ImageFormat::Qcow2 => open_chain(parts(lower, Some(fd))?)?,
    };
    if parent.size() != child.size() {
        return Err(refused("it has another size than the disk").into());
    }
    let mut commit = Commit::new(child, 0, parent, 0)?;
    while let Progress::At(_) = commit.step(STEP)? {}
    Ok(())
}

/// The layers for reading, but for the first if it is given open for writing.
fn parts(layers: &[OpenLayer], first: Option<OwnedFd>) -> Result<Vec<ChainPart>> {
    let mut first = first;
    let mut parts = Vec::new();
    for layer in layers {
        let path = show(&layer.path);
        let (fd, access) = match first.take() {
            Some(fd) => (fd, Access::ReadWrite),
            None => (layer.fd.try_clone().os("dup", &path)?, Access::ReadOnly),
        };
        parts.push(ChainPart {
            store: Arc::new(FileStore::from_fd(fd, path, access)?),
            format: match layer.format {
                ImageFormat::Raw => Format::Raw,
                ImageFormat::Qcow2 => Format::Qcow2,
            },
            access,
        });
    }
    Ok(parts)
}
