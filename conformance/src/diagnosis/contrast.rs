//! What is clean, and what is not: which tensors, and of them which batches,
//! ranks and heads.

use std::collections::BTreeSet;

use super::evidence::{Evidence, Measured};
use super::words::{listed, of_heads, of_ranks};
use crate::oracle::AnswerTensor;

/// Which tensors are wrong, and where, and which are right. None where all are.
pub(super) fn sentence(evidence: &Evidence<'_>) -> Option<String> {
    let (wrong, right): (Vec<_>, Vec<_>) = evidence
        .tensors
        .iter()
        .partition(|tensor| tensor.is_wrong());
    // Those that are wrong in the same places are told together.
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for tensor in wrong {
        let (places, name) = (places(evidence, tensor), tensor.name.name().to_owned());
        match groups.iter_mut().find(|(same, _)| *same == places) {
            Some((_, names)) => names.push(name),
            None => groups.push((places, vec![name])),
        }
    }
    if groups.is_empty() {
        return None;
    }
    let mut parts: Vec<String> = groups
        .into_iter()
        .map(|(places, names)| format!("{} wrong{places}", named(&names)))
        .collect();
    let right: Vec<String> = right.iter().map(|t| t.name.name().to_owned()).collect();
    if !right.is_empty() {
        parts.push(format!("{} right", named(&right)));
    }
    Some(format!("{}.", parts.join(", ")))
}

fn named(names: &[String]) -> String {
    let is = if names.len() == 1 { "is" } else { "are" };
    format!("{} {is}", listed(names))
}

/// Where a tensor is wrong, if not everywhere.
fn places(evidence: &Evidence<'_>, tensor: &Measured<'_>) -> String {
    let ranks_of_tokens = evidence.place_of_token();
    let is_of_tokens = tensor.sizes.tokens == ranks_of_tokens.len() && evidence.ranks() > 1;
    let (mut batches, mut ranks) = (BTreeSet::new(), BTreeSet::new());
    let (mut heads, mut tokens) = (BTreeSet::new(), BTreeSet::new());
    for row in 0..tensor.sizes.rows() {
        if tensor.row(row).any(|i| tensor.is_off(i)) {
            let (batch, token, head) = tensor.sizes.place(row);
            batches.insert(batch);
            heads.insert(head);
            tokens.insert(token);
            if is_of_tokens {
                ranks.insert(ranks_of_tokens[token].0);
            }
        }
    }
    let mut places = String::new();
    if heads.len() < tensor.sizes.heads {
        places += &format!(" in {} alone", heads_told(evidence, tensor, &heads));
    }
    if is_of_tokens && ranks.len() < evidence.ranks() {
        places += &format!(" at the tokens of {} alone", of_ranks(ranks));
    }
    if tensor.sizes.tokens > 1 && tokens.len() < tensor.sizes.tokens.min(4) {
        let tokens: Vec<String> = tokens.iter().map(usize::to_string).collect();
        places += &format!(" (token {})", listed(&tokens));
    }
    if batches.len() < tensor.sizes.batch {
        let batches: Vec<String> = batches.iter().map(usize::to_string).collect();
        places += &format!(" in batch {} alone", listed(&batches));
    }
    places
}

/// The heads, or the ranks of which they are all the heads.
fn heads_told(evidence: &Evidence<'_>, tensor: &Measured<'_>, heads: &BTreeSet<usize>) -> String {
    let of_kv = matches!(
        tensor.name,
        AnswerTensor::KeyGradient | AnswerTensor::ValueGradient | AnswerTensor::KeyNormGradient
    );
    let of = if of_kv { "KV " } else { "" };
    let own = format!("{of}{}", of_heads(heads.iter().copied()));
    let ranges = evidence.heads_of_ranks(tensor.sizes.heads);
    let is_held = |rank: &usize| ranges[*rank].clone().any(|head| heads.contains(&head));
    let ranks: Vec<usize> = (0..ranges.len()).filter(is_held).collect();
    let is_whole = ranks
        .iter()
        .all(|&rank| ranges[rank].clone().all(|head| heads.contains(&head)));
    match is_whole && ranks.len() < heads.len() {
        true => format!("{own}, all those of {},", of_ranks(ranks)),
        false => own,
    }
}
