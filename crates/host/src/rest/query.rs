//! Query strings: the few that the API has, and nothing unknown.

use strake_observe::Result;

use crate::daemon::Images;
use crate::observations::RequestRefused;

/// A query string, taken apart.
pub(super) struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    /// Takes it apart; a key that is not `known` is refused.
    pub(super) fn parse(raw: Option<&'a str>, known: &[&str]) -> Result<Self> {
        let pairs: Vec<_> = raw
            .unwrap_or("")
            .split('&')
            .filter(|part| !part.is_empty())
            .map(|part| part.split_once('=').unwrap_or((part, "")))
            .collect();
        match pairs.iter().find(|(key, _)| !known.contains(key)) {
            Some((key, _)) => Err(refused(
                format!("it knows no '{key}'"),
                format!("the query may have: {}", known.join(", ")),
            )),
            None => Ok(Self(pairs)),
        }
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| *value)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<u64>> {
        self.get(key)
            .map(|value| {
                value.parse().map_err(|_| {
                    refused(
                        format!("'{value}' is not a number"),
                        format!("write for example {key}=1000"),
                    )
                })
            })
            .transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None | Some("false") => Ok(false),
            Some("true" | "") => Ok(true),
            Some(other) => Err(refused(
                format!("'{other}' is neither true nor false"),
                format!("write {key}=true"),
            )),
        }
    }

    pub(super) fn images(&self) -> Result<Images> {
        match self.get("disks") {
            None | Some("keep") => Ok(Images::Keep),
            Some("delete") => Ok(Images::Delete),
            Some(other) => Err(refused(
                format!("disks can be kept or deleted, not '{other}'"),
                "write disks=keep or disks=delete".to_owned(),
            )),
        }
    }
}

fn refused(reason: String, advice: String) -> strake_observe::Observation {
    RequestRefused { reason, advice }.into()
}
