//! The limits of a job as they are written on the command line.

use strake_api::job::{Ceiling, Latency};
use strake_api::spec::Bytes;

/// Bytes per second, or `unlimited`.
pub(super) fn rate(text: &str) -> Result<Ceiling, String> {
    if text == "unlimited" {
        return Ok(Ceiling::Unlimited);
    }
    let rate: Bytes = text.trim_end_matches("/s").parse()?;
    if rate.0 == 0 {
        return Err("a rate of 0 would never end: say unlimited for no limit".to_owned());
    }
    Ok(Ceiling::At(rate.0))
}

/// Requests per second, or `unlimited`.
pub(super) fn iops(text: &str) -> Result<Ceiling, String> {
    if text == "unlimited" {
        return Ok(Ceiling::Unlimited);
    }
    match text.parse() {
        Ok(0) => {
            Err("0 requests per second would never end: say unlimited for no limit".to_owned())
        }
        Ok(most) => Ok(Ceiling::At(most)),
        Err(_) => Err("give a whole number, or unlimited".to_owned()),
    }
}

/// Milliseconds, also parts of one; `auto` or `any`.
pub(super) fn latency(text: &str) -> Result<Latency, String> {
    match text {
        "auto" => return Ok(Latency::Auto),
        "any" => return Ok(Latency::Any),
        _ => {}
    }
    let wrong = || "give milliseconds, for example 5 or 0.5; or auto, or any".to_owned();
    let ms: f64 = text.parse().map_err(|_| wrong())?;
    let us = std::time::Duration::try_from_secs_f64(ms / 1000.0).map_err(|_| wrong())?;
    match u64::try_from(us.as_micros()) {
        Ok(us) if us > 0 => Ok(Latency::Us(us)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_numbers_or_words() {
        assert_eq!(rate("100M"), Ok(Ceiling::At(100 << 20)));
        assert_eq!(rate("1G/s"), Ok(Ceiling::At(1 << 30)));
        assert_eq!(rate("unlimited"), Ok(Ceiling::Unlimited));
        assert_eq!(iops("500"), Ok(Ceiling::At(500)));
        assert_eq!(latency("5"), Ok(Latency::Us(5000)));
        assert_eq!(latency("0.25"), Ok(Latency::Us(250)));
        assert_eq!(latency("any"), Ok(Latency::Any));
        for wrong in ["0", "-1", "x", "", "nan", "1e99"] {
            assert!(rate(wrong).is_err() && iops(wrong).is_err(), "{wrong}");
            assert!(latency(wrong).is_err(), "{wrong}");
        }
    }
}
