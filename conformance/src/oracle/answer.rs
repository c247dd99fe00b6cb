//! The tensors of an answer, by name.

use fixtures::{AttentionCase, Input};

/// A tensor that attention answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AnswerTensor {
    /// The output, `[batch, tokens, query heads, value size]`.
    Out,
    /// The gradient of Q.
    QueryGradient,
    /// The gradient of K.
    KeyGradient,
    /// The gradient of V.
    ValueGradient,
    /// The gradient of the ALiBi slopes, `[query heads]`.
    SlopesGradient,
    /// The gradient of the attention sinks, `[query heads]`.
    SinksGradient,
    /// The gradient of the weight of the queries' norm, `[query heads, head
    /// size]`.
    QueryNormGradient,
    /// The gradient of the weight of the keys' norm, `[KV heads, head size]`.
    KeyNormGradient,
}

impl AnswerTensor {
    /// Every tensor, in the order of a report.
    pub const ALL: [AnswerTensor; 8] = [
        AnswerTensor::Out,
        AnswerTensor::QueryGradient,
        AnswerTensor::KeyGradient,
        AnswerTensor::ValueGradient,
        AnswerTensor::SlopesGradient,
        AnswerTensor::SinksGradient,
        AnswerTensor::QueryNormGradient,
        AnswerTensor::KeyNormGradient,
    ];

    /// The tensors that every answer has.
    pub const ALWAYS: [AnswerTensor; 4] = [
        AnswerTensor::Out,
        AnswerTensor::QueryGradient,
        AnswerTensor::KeyGradient,
        AnswerTensor::ValueGradient,
    ];

    /// The name, as in a file of the exchange: `dq_norm`.
    pub fn name(self) -> &'static str {
        match self {
            AnswerTensor::Out => "out",
            AnswerTensor::QueryGradient => "dq",
            AnswerTensor::KeyGradient => "dk",
            AnswerTensor::ValueGradient => "dv",
            AnswerTensor::SlopesGradient => "dslopes",
            AnswerTensor::SinksGradient => "dsinks",
            AnswerTensor::QueryNormGradient => "dq_norm",
            AnswerTensor::KeyNormGradient => "dk_norm",
        }
    }

    /// The input that it is shaped like. For a gradient, the one that it is the
    /// gradient of.
    pub fn like(self) -> Input {
        match self {
            AnswerTensor::Out => Input::OutputCotangent,
            AnswerTensor::QueryGradient => Input::Query,
            AnswerTensor::KeyGradient => Input::Key,
            AnswerTensor::ValueGradient => Input::Value,
            AnswerTensor::SlopesGradient => Input::Slopes,
            AnswerTensor::SinksGradient => Input::Sinks,
            AnswerTensor::QueryNormGradient => Input::QueryNorm,
            AnswerTensor::KeyNormGradient => Input::KeyNorm,
        }
    }

    /// Its shape over the whole sequence.
    pub fn shape(self, case: &AttentionCase) -> Vec<usize> {
        self.like().shape(case)
    }

    /// Whether it belongs to heads, and not to tokens.
    pub fn is_head_state(self) -> bool {
        self.like().is_head_state()
    }
}

/// What attention answers, over the whole sequence: the output, and the
/// gradient of each input, shaped like that input.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer<T> {
    /// O, `[batch, tokens, query heads, value size]`.
    pub out: T,
    /// The gradient of Q.
    pub dq: T,
    /// The gradient of K.
    pub dk: T,
    /// The gradient of V.
    pub dv: T,
    /// The gradients of what belongs to heads, where the case has it, in the
    /// order of [`AnswerTensor::ALL`].
    pub head_state: Vec<(AnswerTensor, T)>,
}

impl<T> Answer<T> {
    /// The four tensors of every answer, and those gradients of head state that
    /// there are, in the order of [`AnswerTensor::ALL`].
    pub(crate) fn new([out, dq, dk, dv]: [T; 4], head_state: [Option<T>; 4]) -> Answer<T> {
        let names = AnswerTensor::ALL
            .into_iter()
            .skip(AnswerTensor::ALWAYS.len());
        Answer {
            out,
            dq,
            dk,
            dv,
            head_state: names
                .zip(head_state)
                .filter_map(|(name, tensor)| Some((name, tensor?)))
                .collect(),
        }
    }

    /// The tensors that the answer has, in the order of [`AnswerTensor::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (AnswerTensor, &T)> {
        let always = [&self.out, &self.dq, &self.dk, &self.dv];
        let head_state = self.head_state.iter().map(|(name, tensor)| (*name, tensor));
        AnswerTensor::ALWAYS
            .into_iter()
            .zip(always)
            .chain(head_state)
    }

    /// One of them; none where the answer does not have it.
    pub fn get(&self, name: AnswerTensor) -> Option<&T> {
        self.iter()
            .find(|(is, _)| *is == name)
            .map(|(_, tensor)| tensor)
    }

    /// One of them, leaving nothing in its place.
    pub(crate) fn take(&mut self, name: AnswerTensor) -> Option<T>
    where
        T: Default,
    {
        let place = match name {
            AnswerTensor::Out => Some(&mut self.out),
            AnswerTensor::QueryGradient => Some(&mut self.dq),
            AnswerTensor::KeyGradient => Some(&mut self.dk),
            AnswerTensor::ValueGradient => Some(&mut self.dv),
            _ => {
                let state = self.head_state.iter_mut();
                state
                    .map(|(is, tensor)| (*is == name, tensor))
                    .find(|(is, _)| *is)
                    .map(|(_, tensor)| tensor)
            }
        };
        place.map(std::mem::take)
    }

    /// The tensors that an answer to `case` has, each made by `f`.
    pub(crate) fn try_of<E>(
        case: &AttentionCase,
        mut f: impl FnMut(AnswerTensor) -> Result<T, E>,
    ) -> Result<Answer<T>, E> {
        let [out, dq, dk, dv] = AnswerTensor::ALWAYS;
        Ok(Answer {
            out: f(out)?,
            dq: f(dq)?,
            dk: f(dk)?,
            dv: f(dv)?,
            head_state: AnswerTensor::ALL
                .into_iter()
                .filter(|name| name.is_head_state() && name.like().is_present(case))
                .map(|name| Ok((name, f(name)?)))
                .collect::<Result<_, E>>()?,
        })
    }

    /// Turns each tensor into another.
    pub(crate) fn try_map<U, E>(
        self,
        mut f: impl FnMut(AnswerTensor, T) -> Result<U, E>,
    ) -> Result<Answer<U>, E> {
        let [out, dq, dk, dv] = AnswerTensor::ALWAYS;
        Ok(Answer {
            out: f(out, self.out)?,
            dq: f(dq, self.dq)?,
            dk: f(dk, self.dk)?,
            dv: f(dv, self.dv)?,
            head_state: self
                .head_state
                .into_iter()
                .map(|(name, tensor)| Ok((name, f(name, tensor)?)))
                .collect::<Result<_, E>>()?,
        })
    }
}
