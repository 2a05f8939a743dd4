// What runs on which stream, in which order, and when: vector clocks, one for each stream and one for the host.
//
// Compute (stream 0) happens at once, in the thread that asks. Other streams are lazy: their copies run as late as the
// order allows, when compute or the host waits for them, so that whoever forgets to wait sees the bytes of before.
// Whether an access is ordered against those before it is decided when it is submitted, from the clocks alone: every
// time, whatever the bytes happen to be.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace card {

using Clock = std::vector<uint64_t>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// One use of memory, by the number of its operation on its stream.
struct Access {
  int64_t stream = 0;
  uint64_t number = 0;
  std::string operation;
  std::string place;
};

inline bool is_before(const Access& earlier, const Clock& now) {
  return earlier.number == 0 || (static_cast<size_t>(earlier.stream) < now.size() && now[earlier.stream] >= earlier.number);
}

struct Unordered : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The last write and the reads since then of every range of memory, the card's and the host's.
class Ranges {
 public:
  void access(uintptr_t begin, uintptr_t end, bool writes, const Access& access, const Clock& now) {
    if (begin >= end) return;
    split(begin);
    split(end);
    auto first = ranges_.lower_bound(begin), last = ranges_.lower_bound(end);
    for (auto at = first; at != last; ++at) check(at->second, writes, access, now);
    if (writes) {
      ranges_.erase(first, last);
      ranges_[begin] = Range{end, access, {}};
      return;
    }
    uintptr_t from = begin;
    for (auto at = ranges_.lower_bound(begin); from < end;) {
      if (at == ranges_.end() || at->first > from) {
        const uintptr_t until = at == ranges_.end() ? end : std::min(end, at->first);
        at = ranges_.emplace(from, Range{until, Access{}, {}}).first;
      }
      auto& readers = at->second.readers;
      auto known = std::find_if(readers.begin(), readers.end(), [&](const Access& item) { return item.stream == access.stream; });
      if (known == readers.end()) readers.push_back(access);
      else *known = access;
      from = at->second.end;
      ++at;
    }
  }

  void forget(uintptr_t begin, uintptr_t end) {
    split(begin);
    split(end);
    ranges_.erase(ranges_.lower_bound(begin), ranges_.lower_bound(end));
  }

 private:
  struct Range {
    uintptr_t end;
    Access written;
    std::vector<Access> readers;
  };

  void split(uintptr_t at) {
    auto next = ranges_.upper_bound(at);
    if (next == ranges_.begin()) return;
    auto range = std::prev(next);
    if (range->first == at || range->second.end <= at) return;
    Range rest = range->second;
    range->second.end = at;
    ranges_.emplace_hint(next, at, std::move(rest));
  }

  static void check(const Range& range, bool writes, const Access& access, const Clock& now) {
    if (!is_before(range.written, now)) refuse(access, writes, range.written, true);
    if (!writes) return;
    for (const auto& reader : range.readers)
      if (!is_before(reader, now)) refuse(access, true, reader, false);
  }

  static void refuse(const Access& access, bool writes, const Access& earlier, bool wrote) {
    // What other people's code does among itself is theirs: transformers frees what its prefetch stream made while compute reads it.
    if (access.place == "?" && earlier.place == "?") return;
    throw Unordered("unordered access: " + access.operation + " on stream " + std::to_string(access.stream) + " at " + access.place +
                    (writes ? " writes" : " reads") + " what " + earlier.operation + " on stream " + std::to_string(earlier.stream) +
                    " at " + earlier.place + (wrote ? " wrote" : " read") + ", and does not wait for it");
  }

  std::map<uintptr_t, Range> ranges_;
};

// Seconds that things take on the card's own clock; nothing takes any unless a test says so.
struct Speeds {
  double kernel_seconds = 0, memory_seconds_a_byte = 0, h2d_seconds_a_byte = 0, d2h_seconds_a_byte = 0, launch_seconds = 0;
};

struct Stream {
  Clock clock;
  std::deque<std::function<void()>> waiting;
  uint64_t submitted = 0, done = 0;
  double free_at = 0;
};

// A point in a stream's order.
struct Event {
  int64_t stream = 0;
  uint64_t position = 0;
  Clock clock;
  double at = 0;
  bool recorded = false;
};

class Card {
 public:
  std::recursive_mutex mutex;
  Ranges ranges;
  Speeds speeds;
  Clock host;
  double host_at = 0;
  std::map<std::string, double> busy;
  // Told when memory was freed too early: freeing itself cannot raise.
  std::vector<std::string> violations;

  Stream& stream(int64_t id) {
    auto& found = streams_[id];
    if (found.clock.size() <= static_cast<size_t>(id)) found.clock.resize(id + 1, 0);
    return found;
  }

  int64_t make_stream() { return ++made_; }

  // A new operation of a stream: after all that the stream and the host wait for.
  Access submit(int64_t id, const std::string& operation, const std::string& place) {
    auto& own = stream(id);
    join(own.clock, host);
    ++own.clock[id];
    return Access{id, own.clock[id], operation, place};
  }

  void take_time(int64_t id, const std::string& resource, double seconds) {
    auto& own = stream(id);
    own.free_at = std::max(own.free_at, host_at) + seconds;
    host_at += speeds.launch_seconds;
    busy[resource] += seconds;
  }

  void later(int64_t id, std::function<void()> work) {
    auto& own = stream(id);
    ++own.submitted;
    own.waiting.push_back(std::move(work));
  }

  void run_until(int64_t id, uint64_t position) {
    auto& own = stream(id);
    while (own.done < position && !own.waiting.empty()) {
      auto work = std::move(own.waiting.front());
      own.waiting.pop_front();
      ++own.done;
      work();
    }
  }

  void run_all(int64_t id) { run_until(id, stream(id).submitted); }

  void record(Event& event, int64_t id) {
    auto& own = stream(id);
    join(own.clock, host);
    event = Event{id, own.submitted, own.clock, std::max(own.free_at, host_at), true};
  }

  void stream_waits(int64_t id, const Event& event) {
    if (!event.recorded) return;
    auto& own = stream(id);
    join(own.clock, event.clock);
    own.free_at = std::max(own.free_at, event.at);
    if (id == 0) run_until(event.stream, event.position);
    else if (event.stream != id) later(id, [this, other = event.stream, position = event.position] { run_until(other, position); });
  }

  bool is_over(const Event& event) { return !event.recorded || stream(event.stream).done >= event.position; }

  void host_waits(const Event& event) {
    if (!event.recorded) return;
    run_until(event.stream, event.position);
    join(host, event.clock);
    host_at = std::max(host_at, event.at);
  }

  void host_waits_for(int64_t id) {
    Event now;
    record(now, id);
    host_waits(now);
  }

  void host_waits_for_all() {
    std::vector<int64_t> ids;
    for (auto& item : streams_) ids.push_back(item.first);
    for (auto id : ids) host_waits_for(id);
  }

 private:
  std::map<int64_t, Stream> streams_;
  int64_t made_ = 0;
};

}  // namespace card
