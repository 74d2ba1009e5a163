// How the sequence is cut: into chunks inside each scale, and into segments of several chunks.
//
// A segment is what a thread holds of one head at a time, in its first- and second-level cache. Forward only, it
// ends after so many tokens; bidirectional, at the end of the first scale past them, since the backward
// direction starts at a scale's last token.
#pragma once

#include <algorithm>
#include <vector>

#include "mamba2/mamba2.h"

namespace mvar {
namespace mamba2 {

class Cut {
 public:
  Cut(const std::vector<int64_t>& scales, bool whole_scales) {
    int64_t first = 0;
    int64_t segment_first = 0;
    segments_.push_back(0);
    for (int64_t length : scales) {
      const int64_t end = first + length;
      for (int64_t begin = first; first < end;) {
        const int64_t q = end - first < kChunk ? end - first : kChunk;
        chunks_.push_back({first, q, first == begin, first + q == end});
        first += q;
        if (first - segment_first >= kSegment && (first == end || !whole_scales)) {
          segments_.push_back(int64_t(chunks_.size()));
          segment_first = first;
        }
      }
    }
    if (first > segment_first) segments_.push_back(int64_t(chunks_.size()));
  }

  Plan plan() const {
    int64_t longest = 0;
    for (size_t i = 1; i < segments_.size(); ++i) {
      longest = std::max(longest, segments_[i] - segments_[i - 1]);
    }
    return {chunks_.data(), segments_.data(), int64_t(segments_.size()) - 1, longest};
  }

 private:
  static constexpr int64_t kSegment = 64;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> segments_;
};

}  // namespace mamba2
}  // namespace mvar
