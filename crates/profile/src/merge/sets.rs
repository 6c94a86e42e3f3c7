//! Fields with a set of words that are joined.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::{Deciding, Rank, Source, Statement, Why, by_rank, outranked};
use crate::profile::Operator;
use crate::value::Value;

fn words<'s>(said: &'s Statement<'_>) -> impl Iterator<Item = &'s str> {
    match &*said.value {
        Value::Set(words) => Some(words.iter().map(String::as_str)),
        _ => None,
    }
    .into_iter()
    .flatten()
}

/// Defaults count only if nobody adds anything, and then those of the highest rank that has any.
fn counting_default(statements: &[Statement<'_>]) -> Option<Rank> {
    let adds = statements.iter().any(|said| said.operator == Operator::Add);
    if adds {
        return None;
    }
    statements
        .iter()
        .find(|said| said.operator == Operator::Default)
        .map(|said| said.rank)
}

/// Of those who name a word, the highest rank says whether it is in.
pub(super) fn union<'a>(one: &mut Deciding<'a, '_>, statements: &[Statement<'a>]) {
    let default = counting_default(statements);
    let mut verdicts: BTreeMap<&str, (bool, &Statement<'a>)> = BTreeMap::new();
    let mut said_any = false;
    for (rank, group) in by_rank(statements) {
        for said in group {
            let present = match said.operator {
                Operator::Add => true,
                Operator::Default if default == Some(rank) => true,
                Operator::Remove => false,
                _ => {
                    one.resolved.overrode.push(said.yields(
                        first_adder(statements).unwrap_or(Source::Own),
                        Why::OnlyDefault,
                    ));
                    continue;
                }
            };
            said_any |= present;
            let (mut decides, mut outranked_by) = (false, None);
            for word in words(said) {
                match verdicts.get(word) {
                    Some((other, by)) if *other != present => {
                        if by.rank == rank && rank != Rank::Own {
                            one.conflict(by, said);
                            return;
                        }
                        outranked_by = Some(*by);
                    }
                    Some(_) => decides = true, // Says the same: a co-owner.
                    None => {
                        verdicts.insert(word, (present, said));
                        decides = true;
                    }
                }
            }
            match outranked_by {
                Some(by) => {
                    let why = if decides {
                        Why::WordsOutranked
                    } else {
                        outranked(by.rank)
                    };
                    one.resolved.overrode.push(said.yields(by.source, why));
                }
                None => decides = true,
            }
            if decides {
                let list = if present {
                    &mut one.resolved.origin
                } else {
                    &mut one.resolved.held
                };
                list.push(said.source);
            }
        }
    }
    if said_any {
        let set: BTreeSet<String> = verdicts
            .into_iter()
            .filter(|(_, (present, _))| *present)
            .map(|(word, _)| word.to_owned())
            .collect();
        one.resolved.value = Some(Cow::Owned(Value::Set(set)));
    }
}

fn first_adder<'a>(statements: &[Statement<'a>]) -> Option<Source<'a>> {
    statements
        .iter()
        .find(|said| matches!(said.operator, Operator::Add | Operator::Default))
        .map(|said| said.source)
}

/// A word that anybody forbids is out.
pub(super) fn deny_wins<'a>(one: &mut Deciding<'a, '_>, statements: &[Statement<'a>]) {
    let default = counting_default(statements);
    let mut forbidden: BTreeMap<&str, &Statement<'a>> = BTreeMap::new();
    for said in statements {
        if said.operator == Operator::Forbid {
            one.resolved.held.push(said.source);
            for word in words(said) {
                forbidden.entry(word).or_insert(said);
            }
        }
    }
    let mut set = BTreeSet::new();
    let mut said_any = false;
    for said in statements {
        match said.operator {
            Operator::Add => {}
            Operator::Default if default == Some(said.rank) => {}
            Operator::Forbid => continue,
            _ => {
                one.resolved.overrode.push(said.yields(
                    first_adder(statements).unwrap_or(Source::Own),
                    Why::OnlyDefault,
                ));
                continue;
            }
        }
        said_any = true;
        let mut denied = None;
        let mut gave = false;
        for word in words(said) {
            match forbidden.get(word) {
                Some(by) => denied = Some(by.source),
                None => {
                    set.insert(word.to_owned());
                    gave = true;
                }
            }
        }
        if let Some(by) = denied {
            one.resolved.overrode.push(said.yields(by, Why::Forbidden));
        }
        if gave || denied.is_none() {
            one.resolved.origin.push(said.source);
        }
    }
    if said_any {
        one.resolved.value = Some(Cow::Owned(Value::Set(set)));
    }
}
