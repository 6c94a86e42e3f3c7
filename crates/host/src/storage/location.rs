//! Where a disk's data is, as the inventory's bindings say it.
//!
//! In the inventory a location is one text. An absolute path is a file or a block device of this
//! host; texts of other kinds (a URI has a scheme and so never begins with a `/`) are for stores
//! that are none. Whoever needs a file asks for one ([`Location::file`]) and is refused elsewhere.

use std::fmt;
use std::path::{Path, PathBuf};

use strake_api::image::ImageFormat;
use strake_observe::Result;

use crate::config::show;
use crate::observations::{InventoryCorrupt, NotAFile};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A regular file or a block device of this host, by its absolute path.
    File(PathBuf),
}

impl Location {
    /// Reads what [`text`](Self::text) gave.
    ///
    /// # Errors
    /// [`InventoryCorrupt`] if no daemon of this version has written it.
    pub fn parse(text: &str) -> Result<Self> {
        if text.starts_with('/') {
            return Ok(Self::File(PathBuf::from(text)));
        }
        Err(InventoryCorrupt {
            record: format!("the location '{text}'"),
            reason: "it is no absolute path".to_owned(),
        }
        .into())
    }

    /// It as the inventory, specs and the API have it.
    ///
    /// # Errors
    /// Its path is not UTF-8.
    pub fn text(&self) -> Result<&str> {
        match self {
            Self::File(path) => path.to_str().ok_or_else(|| {
                InventoryCorrupt {
                    record: show(path),
                    reason: "the path is not UTF-8".to_owned(),
                }
                .into()
            }),
        }
    }

    /// The path of the file or block device that it is.
    ///
    /// # Errors
    /// [`NotAFile`].
    #[allow(clippy::unnecessary_wraps)] // other kinds of locations have none
    pub fn file(&self) -> Result<&Path, NotAFile> {
        match self {
            Self::File(path) => Ok(path),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// What a disk is bound to: where its data is and in which format. For a chain of images that is
/// the top; what is below is named by the images' own headers, with their formats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Where.
    pub location: Location,
    /// The format; never guessed from the content.
    pub format: ImageFormat,
}

impl Binding {
    /// A file of this host.
    pub fn new(path: impl Into<PathBuf>, format: ImageFormat) -> Self {
        Self {
            location: Location::File(path.into()),
            format,
        }
    }

    /// As [`Location::file`].
    ///
    /// # Errors
    /// [`NotAFile`].
    pub fn file(&self) -> Result<&Path, NotAFile> {
        self.location.file()
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.location.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_comes_through_its_text() {
        let location = Location::File("/fast/root.raw".into());
        assert_eq!(Location::parse(location.text().unwrap()).unwrap(), location);
        for wrong in ["", "fast:root.raw", "nbd://host/root"] {
            assert!(Location::parse(wrong).is_err(), "{wrong}");
        }
    }
}
