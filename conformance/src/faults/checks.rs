//! What is refused before any data moves. Numbers out of their range the core
//! attention refuses, on every rank alike.

use ulysses::{Communicator, SequenceLength, Sharding, TokenPartition};

use super::rank::{Asked, Documents, Halt, Staged};

/// What a rank finds by itself; the cases are such that all ranks find it.
pub(super) fn alone(asked: &Asked) -> Staged<()> {
    let (query, key, value) = (asked.query.size(), asked.key.size(), asked.value.size());
    expect("key", &key[..2], &query[..2])?;
    expect("value", &value[..3], &key[..3])?;
    let tokens = [query[0], query[1]];
    if asked.options.rotary.is_some() || matches!(asked.documents, Some(Documents::FromPositions)) {
        let sections = asked.options.rotary.and_then(|rotary| rotary.sections);
        let due = [sections.map(|_| 3).as_slice(), &tokens].concat();
        expect("position_ids", &asked.positions.size(), &due)?;
    }
    if let Some(mask) = &asked.attention_mask {
        expect("attention_mask", &mask.size(), &tokens)?;
    }
    for (argument, tensor) in [("slopes", &asked.slopes), ("sinks", &asked.sinks)] {
        if let Some(tensor) = tensor {
            expect(argument, &tensor.size(), &[query[2]])?;
        }
    }
    if let Some([of_queries, of_keys]) = &asked.norms {
        expect("q_norm", &of_queries.size(), &query[2..])?;
        expect("k_norm", &of_keys.size(), &key[2..])?;
    }
    Ok(())
}

/// The tokens of every rank. What is wrong with it, every rank sees.
pub(super) fn token_partition(
    communicator: &dyn Communicator,
    asked: &Asked,
) -> Staged<TokenPartition> {
    let gathered = communicator.all_gather(&[asked.query.size()[1]])?;
    let tokens: Vec<usize> = gathered.concat().iter().map(|&n| n as usize).collect();
    let sharding = match asked.is_alone {
        true => Sharding::Contiguous,
        false => asked.options.sharding,
    };
    Ok(TokenPartition::new(sharding, &tokens)?)
}

/// What does not fit the length of the whole sequence.
pub(super) fn together(asked: &Asked, tokens: &TokenPartition) -> Staged<()> {
    let total = tokens.total();
    if let SequenceLength::Fixed { global, .. } = asked.options.sequence_length
        && global != total
    {
        return refuse(format!(
            "`query` has {total} tokens, but the length is fixed at {global}"
        ));
    }
    if let Some(Documents::Ends(ends)) = &asked.documents
        && let Some(row) = ends.iter().find(|row| row.last() != Some(&total))
    {
        return refuse(format!(
            "`documents` end at {row:?}, but there are {total} tokens"
        ));
    }
    Ok(())
}

fn expect(argument: &str, given: &[i64], due: &[i64]) -> Staged<()> {
    match given == due {
        true => Ok(()),
        false => refuse(format!(
            "`{argument}` has sizes {given:?}, but {due:?} are due"
        )),
    }
}

/// Refuses in words.
pub(super) fn refuse<T>(message: impl Into<String>) -> Staged<T> {
    Err(Halt::Said(message.into()))
}
