//! Places slots in an arena: slots that live at the same time get different places, others may share one.

use std::ops::Range;

use crate::arena::ALIGNMENT;

/// A piece of the activation arena and the steps, first to last, during which it holds something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub len: usize,
    pub first: usize,
    pub last: usize,
    pub offset: usize,
}

impl Slot {
    pub fn new(len: usize, first: usize, last: usize) -> Self {
        Self { len, first, last, offset: 0 }
    }

    /// Its elements in the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    fn end(&self) -> usize {
        self.offset + self.len.next_multiple_of(ALIGNMENT)
    }

    fn meets(&self, other: &Slot) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Places every slot, largest first, at the lowest offset where it overlaps no slot that lives at the same time.
/// Returns the length of the arena.
pub(super) fn place(slots: &mut [Slot]) -> usize {
    let mut order: Vec<usize> = (0..slots.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(slots[index].len), slots[index].first));
    let mut placed: Vec<usize> = Vec::with_capacity(slots.len());
    let mut total = 0;
    for index in order {
        let mut neighbours: Vec<&Slot> =
            placed.iter().map(|&other| &slots[other]).filter(|other| other.meets(&slots[index])).collect();
        neighbours.sort_by_key(|slot| slot.offset);
        let needed = slots[index].len.next_multiple_of(ALIGNMENT);
        let mut offset = 0;
        for neighbour in neighbours {
            if offset + needed <= neighbour.offset {
                break;
            }
            offset = offset.max(neighbour.end());
        }
        slots[index].offset = offset;
        total = total.max(slots[index].end());
        placed.push(index);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_live_together_never_overlap_and_others_share() {
        // Many random slots from a seed. The check below does not depend on the method of the placement.
        let mut state = 1u64;
        let mut next = |limit: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % limit
        };
        for _ in 0..50 {
            let mut slots: Vec<Slot> = (0..40)
                .map(|_| {
                    let first = next(30);
                    Slot::new(1 + next(1000), first, first + next(8))
                })
                .collect();
            let total = place(&mut slots);
            for (i, a) in slots.iter().enumerate() {
                assert!(a.range().end <= total && a.offset % ALIGNMENT == 0);
                for b in &slots[i + 1..] {
                    let apart = a.range().end <= b.offset || b.range().end <= a.offset;
                    assert!(apart || a.last < b.first || b.last < a.first, "{a:?} and {b:?}");
                }
            }
            let sum: usize = slots.iter().map(|slot| slot.len.next_multiple_of(ALIGNMENT)).sum();
            let peak = (0..40).map(|step| {
                let alive = slots.iter().filter(|slot| slot.first <= step && step <= slot.last);
                alive.map(|slot| slot.len.next_multiple_of(ALIGNMENT)).sum::<usize>()
            });
            let peak = peak.max().unwrap_or(0);
            assert!(total < sum && total >= peak && total <= peak * 3 / 2, "{total} of {sum}, at least {peak}");
        }
    }
}
