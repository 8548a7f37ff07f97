// The whole case list through the library's public interface, in shards that ctest runs side by side.
#include <gtest/gtest.h>

#include <map>

#include "verify/verify.hpp"

namespace strobe::verify {
namespace {

constexpr int kShards = 144;

class Verify : public testing::TestWithParam<int> {};

TEST_P(Verify, CaseList) {
    LibrarySubject subject;
    const std::vector<Case> cases = verify_cases();
    for (size_t n = static_cast<size_t>(GetParam()); n < cases.size(); n += kShards) {
        const CaseResult r = verify_case(cases[n], subject);
        EXPECT_EQ(r.outcome, Outcome::passed) << r.name << ": " << r.message;
    }
}

INSTANTIATE_TEST_SUITE_P(Shard, Verify, testing::Range(0, kShards));

TEST(VerifyReference, IsServedByName) {
    LibrarySubject subject("reference");
    for (const Case& c : option_cases({.dtype = DType::f16, .seqlen_q = 7, .seqlen_k = 12, .head_dim = 8})) {
        const CaseResult r = verify_case(c, subject);
        EXPECT_EQ(r.outcome, Outcome::passed) << r.name << ": " << r.message;
    }
}

}  // namespace
}  // namespace strobe::verify
