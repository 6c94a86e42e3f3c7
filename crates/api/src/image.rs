//! Images: which format a file has, and how a monitor is given one.
//!
//! A format is told, never guessed: a guest can write anything to the first sectors of a raw disk.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::control::FdIndex;

/// The format of an image's file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Byte N of the disk is byte N of the file or block device.
    #[default]
    Raw,
    /// qcow2, version 2 or 3, with whatever it names as its backing file.
    Qcow2,
}

impl ImageFormat {
    /// What a spec means that names no format: the end of the file's name decides, never the
    /// file's content. The spec's author chose that name; a guest cannot.
    #[must_use]
    pub fn of_name(image: &str) -> Self {
        let end = image.len().saturating_sub(".qcow2".len());
        match image.get(end..) {
            Some(end) if end.eq_ignore_ascii_case(".qcow2") => Self::Qcow2,
            _ => Self::Raw,
        }
    }

    /// Its name, in specs and headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(format!("'{other}' is no image format: write raw or qcow2")),
        }
    }
}

/// An image as a monitor is given it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ImageConfig {
    /// A raw file or block device.
    Raw {
        /// It, open for reading and, if the disk may be written, writing; with O_DIRECT where the
        /// file system can.
        file: FdIndex,
        /// Its path, for observations only.
        path: String,
    },
    /// A qcow2 image and everything below it.
    Qcow2 {
        /// From the top, which is qcow2 itself, down to the last one, which names none below it.
        layers: Vec<LayerConfig>,
    },
}

impl ImageConfig {
    /// The name by which observations call it.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::Raw { path, .. } => path,
            Self::Qcow2 { layers } => layers.first().map_or("", |layer| &layer.path),
        }
    }
}

/// One file of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// The file, open as `access` says.
    pub file: FdIndex,
    /// Its path, for observations only; long ones of lower layers are cut.
    pub path: String,
    /// Its format, as the inventory or the image above says.
    pub format: ImageFormat,
    /// Whether it may be written.
    pub access: LayerAccess,
}

/// Whether a layer may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerAccess {
    /// It is only read.
    ReadOnly,
    /// It is written too: the top of a disk that the guest may write.
    ReadWrite,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_name_tells_the_format() {
        for name in ["fast:a.qcow2", "/x/A.QCOW2", ".qcow2"] {
            assert_eq!(ImageFormat::of_name(name), ImageFormat::Qcow2, "{name}");
        }
        for name in [
            "",
            "fast:a.raw",
            "/x/qcow2",
            "/dev/vg/é",
            "éqcow2",
            "a.qcow2.raw",
        ] {
            assert_eq!(ImageFormat::of_name(name), ImageFormat::Raw, "{name}");
        }
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert!("vmdk".parse::<ImageFormat>().is_err());
    }
}
