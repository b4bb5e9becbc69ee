//! Plans how a batch of requests becomes system calls: neighbours are joined into spans. Pure.

use std::ops::Range;

/// Where one request lies.
pub(crate) trait Placed {
    /// First byte.
    fn start(&self) -> u64;
    /// Bytes.
    fn length(&self) -> u64;

    /// The byte after the last one.
    fn end(&self) -> u64 {
        self.start().saturating_add(self.length())
    }
}

impl Placed for crate::ReadRequest<'_> {
    fn start(&self) -> u64 {
        self.offset
    }

    fn length(&self) -> u64 {
        self.buffer.len() as u64
    }
}

impl Placed for crate::WriteRequest<'_> {
    fn start(&self) -> u64 {
        self.offset
    }

    fn length(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// When two neighbours are joined.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JoinRule {
    /// Largest gap in bytes between them; 0: they touch.
    pub(crate) max_gap_bytes: u64,
    /// A span does not grow beyond this many bytes; a single request may be longer.
    pub(crate) max_span_bytes: u64,
    /// Nor beyond this many requests.
    pub(crate) max_requests: usize,
}

/// Splits `sorted` (ascending, not overlapping) into the index ranges of its spans.
pub(crate) fn plan_spans<T: Placed>(sorted: &[T], rule: JoinRule) -> Vec<Range<usize>> {
    let mut spans = Vec::new();
    let mut first = 0;
    for next in 1..=sorted.len() {
        if next == sorted.len() || !joins(&sorted[first..next], &sorted[next], rule) {
            spans.push(first..next);
            first = next;
        }
    }
    spans
}

fn joins<T: Placed>(span: &[T], next: &T, rule: JoinRule) -> bool {
    let (start, end) = (span[0].start(), span[span.len() - 1].end());
    next.start().saturating_sub(end) <= rule.max_gap_bytes
        && next.end().saturating_sub(start) <= rule.max_span_bytes
        && span.len() < rule.max_requests
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Run(u64, u64);

    impl Placed for Run {
        fn start(&self) -> u64 {
            self.0
        }

        fn length(&self) -> u64 {
            self.1
        }
    }

    proptest! {
        #[test]
        fn spans_cover_every_request_once_and_obey_the_rule(
            steps in prop::collection::vec((0u64..9, 1u64..9), 0..60),
            max_gap_bytes in 0u64..4,
            max_span_bytes in 1u64..30,
            max_requests in 1usize..6,
        ) {
            let mut at = 0;
            let runs: Vec<Run> = steps.iter().map(|&(gap, length)| {
                let run = Run(at + gap, length);
                at = run.end();
                run
            }).collect();
            let rule = JoinRule { max_gap_bytes, max_span_bytes, max_requests };

            let spans = plan_spans(&runs, rule);

            let covered: Vec<usize> = spans.iter().cloned().flatten().collect();
            prop_assert_eq!(covered, (0..runs.len()).collect::<Vec<_>>());
            for span in &spans {
                let bytes = runs[span.end - 1].end() - runs[span.start].start();
                prop_assert!(span.len() == 1 || bytes <= max_span_bytes);
                prop_assert!(span.len() <= max_requests);
                for i in span.start + 1..span.end {
                    prop_assert!(runs[i].start() - runs[i - 1].end() <= max_gap_bytes);
                }
            }
            for pair in spans.windows(2) {
                // No two spans that could have been one: the rule forbids joining at the boundary.
                let (left, right) = (&pair[0], &pair[1]);
                let gap = runs[right.start].start() - runs[right.start - 1].end();
                let bytes = runs[right.start].end() - runs[left.start].start();
                prop_assert!(
                    gap > max_gap_bytes || bytes > max_span_bytes || left.len() == max_requests
                );
            }
        }
    }
}
