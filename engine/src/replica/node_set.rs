//! A small set of nodes: the members that have not answered yet.
//!
//! A volume has few replicas, so the set is a short sorted list that lies in place and allocates nothing.

use crate::types::{NodeId, REPLICAS_MAX};

/// See the module's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeSet {
    nodes: [NodeId; REPLICAS_MAX],
    len: usize,
}

impl NodeSet {
    fn nodes(&self) -> &[NodeId] {
        &self.nodes[..self.len]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn contains(&self, node: NodeId) -> bool {
        self.nodes().contains(&node)
    }

    /// The nodes, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes().iter().copied()
    }

    pub(super) fn insert(&mut self, node: NodeId) {
        let Err(at) = self.nodes().binary_search(&node) else { return };
        assert!(self.len < REPLICAS_MAX, "more nodes than a volume can have replicas");
        self.nodes.copy_within(at..self.len, at + 1);
        self.nodes[at] = node;
        self.len += 1;
    }

    /// True if the node was in the set.
    pub(super) fn remove(&mut self, node: NodeId) -> bool {
        let before = self.len;
        self.retain(|n| n != node);
        self.len < before
    }

    pub(super) fn retain(&mut self, keep: impl Fn(NodeId) -> bool) {
        let mut kept = 0;
        for at in 0..self.len {
            if keep(self.nodes[at]) {
                self.nodes[kept] = self.nodes[at];
                kept += 1;
            }
        }
        self.len = kept;
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> Self {
        let mut set = Self::default();
        nodes.into_iter().for_each(|node| set.insert(node));
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_does_what_an_ordered_set_does(steps in prop::collection::vec((1u64..8, 0u8..4), 1..60)) {
            let (mut set, mut model) = (NodeSet::default(), BTreeSet::new());
            for (node, step) in steps {
                let node = NodeId(node);
                match step {
                    0 | 1 => {
                        set.insert(node);
                        model.insert(node);
                    }
                    2 => prop_assert_eq!(set.remove(node), model.remove(&node)),
                    _ => {
                        set.retain(|n| n > node);
                        model.retain(|n| *n > node);
                    }
                }
                prop_assert!(set.iter().eq(model.iter().copied()));
                prop_assert_eq!((set.len(), set.is_empty()), (model.len(), model.is_empty()));
                prop_assert_eq!(set.contains(node), model.contains(&node));
            }
            prop_assert_eq!(model.iter().copied().collect::<NodeSet>().len(), set.len());
        }
    }
}
