//! One known failure.

use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::judge::{Judgement, Verdict};

/// The file: its entries.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entries {
    #[serde(default)]
    pub(super) known: Vec<Entry>,
}

/// A failure that is known.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The case's name, or a pattern of it: `*` stands for any text.
    pub case: String,
    /// Who fails; anybody where none is named.
    pub implementation: Option<String>,
    /// How it fails: `fail`, `crash` or `hang`.
    #[serde(default, deserialize_with = "failure")]
    pub verdict: Option<Verdict>,
    /// What the judgement's sentence or one of its details contains.
    pub reason: String,
    /// Where the failure is explained.
    pub link: String,
}

impl Entry {
    /// The entry of a failure that nobody has explained yet.
    pub(super) fn unexplained(implementation: &str, case: &str, judgement: &Judgement) -> Entry {
        // How many cases a rank has seen before is another number the next time.
        let (reason, _) = judgement
            .sentence
            .split_once(" (case ")
            .unwrap_or((&judgement.sentence, ""));
        Entry {
            case: case.to_owned(),
            implementation: Some(implementation.to_owned()),
            verdict: Some(judgement.verdict),
            reason: reason.to_owned(),
            link: String::new(),
        }
    }

    /// What the entry lacks, if anything.
    pub(super) fn lack(&self) -> Option<String> {
        let case = &self.case;
        if self.reason.trim().is_empty() {
            return Some(format!(
                "the entry for `{case}` has no `reason`: write words that the failure is told in"
            ));
        }
        self.link.trim().is_empty().then(|| {
            format!("the entry for `{case}` has no `link`: say where this failure is explained")
        })
    }

    /// Whether the entry is of this case of this implementation.
    pub(super) fn is_of(&self, implementation: &str, case: &str) -> bool {
        let is_of = |of: &String| of == implementation;
        self.implementation.as_ref().is_none_or(is_of) && self.matches(case)
    }

    /// Whether the case's name is the entry's, or fits its pattern.
    pub(super) fn matches(&self, case: &str) -> bool {
        let mut parts = self.case.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = case.strip_prefix(first) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            match rest.split_once(part) {
                Some((_, behind)) => rest = behind,
                None => return false,
            }
        }
        rest.ends_with(last)
    }

    /// Whether this is the failure that the entry tells of.
    pub(super) fn explains(&self, judgement: &Judgement) -> bool {
        let Judgement {
            verdict,
            sentence,
            details,
            ..
        } = judgement;
        verdict.is_failure()
            && self.verdict.is_none_or(|due| due == *verdict)
            && [sentence]
                .into_iter()
                .chain(details)
                .any(|words| words.contains(&self.reason))
    }

    /// Says that a failure is another than the entry tells of.
    pub(super) fn mismatch(&self) -> String {
        let verdict = self.verdict.map_or("failure", Verdict::name);
        let (reason, link) = (&self.reason, &self.link);
        format!("known is another failure of this case, a {verdict} with `{reason}`: {link}")
    }
}

/// One of the verdicts that are failures, by name.
fn failure<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Verdict>, D::Error> {
    let name = String::deserialize(deserializer)?;
    let failures = Verdict::ALL
        .into_iter()
        .filter(|verdict| verdict.is_failure());
    let verdict = failures.clone().find(|verdict| verdict.name() == name);
    verdict.map(Some).ok_or_else(|| {
        let names: Vec<_> = failures.map(Verdict::name).collect();
        D::Error::custom(format!("`{name}` is none of {}", names.join(", ")))
    })
}
